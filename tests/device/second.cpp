// A second device that lies in the host's memory: torch's PrivateUse1, as strict as a GPU and as late as a GPU may be.
//
// - Every operator runs the CPU's kernel, but two devices in one operation are an error, and so is a generator of another one.
// - New memory is full of NaN (0xFF), and a limit can be set: beyond it torch.OutOfMemoryError.
// - A copy from pinned memory that nobody waits for happens as late as the order of its stream allows: kernels of another
//   stream that did not wait for an event read NaN. A copy back to pinned memory is not there before somebody waits.
// - Memory that is freed belongs at once to the stream that it was made in. Where another stream may still use it that is a race, and counted;
//   where record_stream told of it, it stays taken until the host has waited for that stream, as if the GPU were infinitely far behind.
// - What makes the host wait is counted.
// - Attention is one fused kernel, as strict as cuDNN's was found to be: it reads queries, keys and values whose rows may lie apart, but
//   its backward pass takes the result's strides for the gradient's, and gives NaN where they are others.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/Resize.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>

namespace {

using at::Tensor;
const c10::Device kSecond(c10::DeviceType::PrivateUse1, 0);
constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
std::recursive_mutex lock;
using Locked = std::lock_guard<std::recursive_mutex>;

// ---- memory

using Clock = std::map<c10::StreamId, uint64_t>;  // stream -> how much of it is known to be done
struct Block { void* data; size_t bytes; c10::StreamId home; Clock uses; std::set<c10::StreamId> recorded; };
std::map<c10::StreamId, uint64_t> ticks;     // uses so far
std::map<c10::StreamId, Clock> seen;         // what a stream waits for before its next job
Clock host_seen;
std::vector<Block*> freed;                   // whose other streams may not be done
thread_local c10::StreamId current = 0;
size_t limit_bytes = 0, used_bytes = 0, peak_bytes = 0, waits = 0, races = 0, host_emptied = 0;
bool has_double = true;
std::map<const char*, size_t> pinned;  // start -> bytes

void* filled(size_t bytes) {
  void* data = nullptr;
#ifdef _WIN32
  data = _aligned_malloc(bytes, 64);
#else
  if (posix_memalign(&data, 64, bytes)) data = nullptr;
#endif
  TORCH_CHECK(data, "the host has no memory for the second device");
  return std::memset(data, 0xFF, bytes);
}

void give_back(void* data) {
#ifdef _WIN32
  _aligned_free(data);
#else
  std::free(data);
#endif
}

bool is_known(const Clock& clock, c10::StreamId stream, uint64_t tick) {
  auto found = clock.find(stream);
  return found != clock.end() && found->second >= tick;
}

void merge(Clock& into, const Clock& other) {
  for (auto& [stream, tick] : other) into[stream] = std::max(into[stream], tick);
}

void give_up(Block* block) {
  used_bytes -= block->bytes;
  std::memset(block->data, 0xFF, block->bytes);
  give_back(block->data);
  delete block;
}

void release(void* context) {
  Locked guard(lock);
  auto* block = static_cast<Block*>(context);
  bool is_late = false;
  for (auto& [stream, tick] : block->uses) {
    if (stream == block->home || is_known(host_seen, stream, tick)) continue;
    if (block->recorded.count(stream))
      is_late = true;
    else if (!is_known(seen[block->home], stream, tick))
      ++races;
  }
  if (is_late)
    freed.push_back(block);
  else
    give_up(block);
}

void take_back(bool all) {
  auto is_done = [all](Block* block) {
    for (auto& [stream, tick] : block->uses)
      if (!all && stream != block->home && block->recorded.count(stream) && !is_known(host_seen, stream, tick)) return false;
    give_up(block);
    return true;
  };
  freed.erase(std::remove_if(freed.begin(), freed.end(), is_done), freed.end());
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, nullptr, kSecond};
    Locked guard(lock);
    take_back(false);
    if (limit_bytes && used_bytes + bytes > limit_bytes) take_back(true);
    TORCH_CHECK_WITH(OutOfMemoryError, !limit_bytes || used_bytes + bytes <= limit_bytes, "second device out of memory. Tried to allocate ",
                     bytes, " bytes; ", used_bytes, " of ", limit_bytes, " are taken");
    auto* block = new Block{filled(bytes), bytes, current, {}, {}};
    used_bytes += bytes;
    peak_bytes = std::max(peak_bytes, used_bytes);
    return {block->data, block, &release, kSecond};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

void unpin(void* data) {
  Locked guard(lock);
  pinned.erase(static_cast<const char*>(data));
  give_back(data);
}

struct PinnedMemory final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, nullptr, c10::Device(c10::kCPU)};
    Locked guard(lock);
    void* data = filled(bytes);
    pinned[static_cast<const char*>(data)] = bytes;
    return {data, data, &unpin, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &unpin; }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override { ++host_emptied; }
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

bool is_pinned(const void* data) {
  Locked guard(lock);
  auto next = pinned.upper_bound(static_cast<const char*>(data));
  if (next == pinned.begin()) return false;
  --next;
  return static_cast<const char*>(data) < next->first + next->second;
}

DeviceMemory device_memory;
PinnedMemory pinned_memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &device_memory);
REGISTER_HOST_ALLOCATOR(c10::DeviceType::PrivateUse1, &pinned_memory);

// ---- streams: what is late

struct Job { std::function<void()> run; bool kernels_wait; };
struct Queue { std::deque<Job> jobs; uint64_t done = 0; };
struct Mark { c10::StreamId stream; uint64_t end; Clock clock; };
std::map<c10::StreamId, Queue> queues;
c10::StreamId num_streams = 1;

void used(const Tensor& tensor, c10::StreamId stream) {
  Locked guard(lock);
  if (auto* block = static_cast<Block*>(tensor.storage().data_ptr().get_context())) block->uses[stream] = ++ticks[stream];
}

Clock clock_of(c10::StreamId stream) {
  Clock clock = seen[stream];
  clock[stream] = ticks[stream];
  return clock;
}

void run_until(c10::StreamId stream, uint64_t end) {
  Locked guard(lock);
  auto& queue = queues[stream];
  while (!queue.jobs.empty() && queue.done < end) {
    auto job = std::move(queue.jobs.front());
    queue.jobs.pop_front();
    ++queue.done;
    job.run();
  }
}

uint64_t end_of(c10::StreamId stream) {
  auto& queue = queues[stream];
  return queue.done + queue.jobs.size();
}

void run_all(c10::StreamId stream) {
  Locked guard(lock);
  run_until(stream, end_of(stream));
}

void before_kernel() {  // copies back to the host may stay late
  Locked guard(lock);
  auto& queue = queues[current];
  uint64_t end = 0;
  for (size_t i = 0; i < queue.jobs.size(); ++i)
    if (queue.jobs[i].kernels_wait) end = queue.done + i + 1;
  run_until(current, end);
}

void wait_here() {
  ++waits;
  run_all(current);
  Locked guard(lock);
  merge(host_seen, clock_of(current));
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return kSecond; }
  c10::Device getDevice() const override { return kSecond; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Stream made(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, kSecond, id); }
  c10::Stream getStream(c10::Device) const override { return made(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return made(0); }
  c10::Stream getNewStream(c10::Device, int) const override { Locked guard(lock); return made(num_streams++); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = current;
    current = stream.id();
    return made(before);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    Locked guard(lock);
    if (!*event) *event = new Mark();
    *static_cast<Mark*>(*event) = Mark{stream.id(), end_of(stream.id()), clock_of(stream.id())};
  }
  void block(void* event, const c10::Stream& stream) const override {
    Locked guard(lock);
    auto* mark = static_cast<Mark*>(event);
    if (!mark) return;
    merge(seen[stream.id()], mark->clock);
    run_until(mark->stream, mark->end);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Mark*>(event); }
  bool queryEvent(void* event) const override {
    Locked guard(lock);
    auto* mark = static_cast<Mark*>(event);
    return !mark || queues[mark->stream].done >= mark->end;
  }
  bool queryStream(const c10::Stream& stream) const override { Locked guard(lock); return queues[stream.id()].jobs.empty(); }
  void synchronizeEvent(void* event) const override {
    ++waits;
    Locked guard(lock);
    auto* mark = static_cast<Mark*>(event);
    if (!mark) return;
    run_until(mark->stream, mark->end);
    merge(host_seen, mark->clock);
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    ++waits;
    run_all(stream.id());
    Locked guard(lock);
    merge(host_seen, clock_of(stream.id()));
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    ++waits;
    Locked guard(lock);
    for (c10::StreamId id = 0; id < num_streams; ++id) run_all(id), merge(host_seen, clock_of(id));
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

// ---- random numbers: the CPU's, by a generator that only this device takes

struct Numbers final : c10::GeneratorImpl {
  at::Generator inner;
  explicit Numbers(at::Generator made) : GeneratorImpl(kSecond, kKeys), inner(std::move(made)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return const_cast<at::Generator&>(inner).seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  Numbers* clone_impl() const override { return new Numbers(inner.clone()); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Device getDeviceFromPtr(void*) const override { return kSecond; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator made = getNewGenerator(0);
    return made;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Numbers>(at::detail::createCPUGenerator());
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto fresh = device_memory.allocate(bytes);
    if (storage.data() && bytes) std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ---- operators

bool is_second(const Tensor& tensor) { return tensor.defined() && tensor.device().is_privateuseone(); }

// The same memory as a tensor of the CPU, with the whole of its storage behind it.
Tensor as_cpu(const Tensor& tensor) {
  c10::DataPtr data(tensor.storage().mutable_data(), c10::Device(c10::kCPU));
  c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), nullptr, false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.is_conj()) alias._set_conj(true);
  if (tensor.is_neg()) alias._set_neg(true);
  return alias;
}

// A view of `base` there, where the CPU's kernel made `view` of its alias.
Tensor as_second(const Tensor& view, const Tensor& base) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(base.storage()), base.key_set(), view.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
  return made;
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>, std::optional<c10::Device>,
             std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK_TYPE(has_double || c10::dtype_or_default(dtype) != at::kDouble, "the second device has no float64");
  return at::detail::empty_generic(size, &device_memory, kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                     std::optional<c10::Device>, std::optional<bool>) {
  TORCH_CHECK_TYPE(has_double || c10::dtype_or_default(dtype) != at::kDouble, "the second device has no float64");
  return at::detail::empty_strided_generic(size, stride, &device_memory, kKeys, c10::dtype_or_default(dtype));
}

Tensor moved(const Tensor& result) {
  if (!result.defined()) return result;
  auto dense = result.is_non_overlapping_and_dense() ? result : result.contiguous();
  auto made = empty_strided(dense.sizes(), dense.strides(), dense.scalar_type(), {}, {}, {});
  if (dense.numel()) as_cpu(made).copy_(dense);
  return made;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (!to.numel()) return to;
  if (is_second(from) && is_second(to)) {
    before_kernel();
    used(from, current), used(to, current);
    as_cpu(to).copy_(as_cpu(from));
  } else if (is_second(to)) {
    used(to, current);
    auto copy = [from, to] { at::NoGradGuard none; as_cpu(to).copy_(from); };
    if (non_blocking && is_pinned(from.data_ptr())) {
      Locked guard(lock);
      queues[current].jobs.push_back({copy, true});
    } else {
      wait_here();
      copy();
    }
  } else if (non_blocking && is_pinned(to.data_ptr())) {
    before_kernel();
    used(from, current);
    auto now = as_cpu(from).clone();  // later writes of this stream come after the copy
    Locked guard(lock);
    queues[current].jobs.push_back({[now, to] { at::NoGradGuard none; to.unsafeGetTensorImpl(); Tensor(to).copy_(now); }, false});
  } else {
    wait_here();
    Tensor(to).copy_(as_cpu(from));
  }
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_(to, from.sizes());
  return copy_from(from, to, false);
}

const Tensor& resize_(const Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat> format) {
  before_kernel();
  return at::native::resize_(self, C10_AS_INTARRAYREF_SLOW(size), format);
}

at::Scalar local_scalar(const Tensor& self) {
  wait_here();
  return as_cpu(self).item();
}

Tensor& set_storage(Tensor& self, c10::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(storage));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_whole(Tensor& self, c10::Storage storage) {
  auto length = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage(self, std::move(storage), 0, {length}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

void record_stream(Tensor& tensor, c10::Stream stream) {
  Locked guard(lock);
  if (auto* block = static_cast<Block*>(tensor.storage().data_ptr().get_context())) block->recorded.insert(stream.id());
}

const std::set<std::string> kTakesIndicesOfCpu = {
    "aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::_unsafe_index"};
const std::set<std::string> kWaits = {"aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::unique_dim"};
const std::set<std::string> kNoIntegers = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::dot"};

// What CUDA's kernels refuse and the CPU's take.
void check_as_cuda(const std::string& name, const std::vector<Tensor>& tensors) {
  if (kNoIntegers.count(name))
    for (auto& tensor : tensors)
      TORCH_CHECK(!at::isIntegralType(tensor.scalar_type(), true), "\"", name, "\" not implemented for '", tensor.scalar_type(), "'");
  if (name == "aten::_int_mm") {
    TORCH_CHECK(tensors[0].size(0) > 16, "self.size(0) needs to be greater than 16, but got ", tensors[0].size(0));
    TORCH_CHECK(tensors[0].size(1) > 0 && tensors[0].size(1) % 8 == 0, "self.size(1) needs to be a multiple of 8");
    TORCH_CHECK(tensors[1].size(1) > 0 && tensors[1].size(1) % 8 == 0, "mat2.size(1) needs to be a multiple of 8");
  }
}

// Arguments of one call as the CPU's kernel takes them, and the way back.
struct Call {
  std::string name;
  std::vector<Tensor> originals, aliases;
  std::vector<std::string> on_cpu;

  Tensor taken(const Tensor& tensor, bool is_written) {
    if (!tensor.defined()) return tensor;
    if (!is_second(tensor)) {
      if (tensor.dim() > 0) on_cpu.push_back(tensor.toString());
      return tensor;
    }
    auto alias = is_written && !tensor.numel() ? at::empty(tensor.sizes(), tensor.options().device(c10::kCPU)) : as_cpu(tensor);
    used(tensor, current);
    originals.push_back(tensor);
    aliases.push_back(alias);
    return alias;
  }

  Tensor given(const Tensor& result, bool is_view) {
    for (size_t i = 0; i < aliases.size(); ++i) {
      if (result.is_same(aliases[i])) return originals[i];
      if (is_view && result.storage().data() == originals[i].storage().data()) return as_second(result, originals[i]);
    }
    return moved(result);
  }

  // Outputs that were empty and grew.
  void grow() {
    for (size_t i = 0; i < aliases.size(); ++i)
      if (aliases[i].sizes() != originals[i].sizes()) {
        at::native::resize_(originals[i], aliases[i].sizes());
        as_cpu(originals[i]).copy_(aliases[i]);
      }
  }
};

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  Call call{schema.name(), {}, {}, {}};
  const auto begin = stack->size() - schema.arguments().size();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    auto& value = (*stack)[begin + i];
    const auto* info = schema.arguments()[i].alias_info();
    const bool is_written = info && info->isWrite();
    if (value.isTensor()) {
      value = call.taken(value.toTensor(), is_written);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(call.taken(tensor, is_written));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional<Tensor>(call.taken(*tensor, false)) : tensor);
      value = list;
    } else if (value.isDevice() && value.toDevice().is_privateuseone()) {
      value = c10::Device(c10::kCPU);
    } else if (value.isGenerator()) {
      auto generator = value.toGenerator();
      TORCH_CHECK(generator.device().is_privateuseone(), "Expected a 'second' device type for generator but found '", generator.device(), "'");
      value = static_cast<Numbers*>(generator.unsafeGetGeneratorImpl())->inner;
    }
  }
  TORCH_CHECK(call.originals.empty() || call.on_cpu.empty() || kTakesIndicesOfCpu.count(call.name),
              "Expected all tensors to be on the same device, but found at least two devices, second:0 and cpu! (", call.name, ")");
  check_as_cuda(call.name, call.originals);
  before_kernel();
  if (kWaits.count(call.name)) wait_here();
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.grow();
  const auto first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    auto& value = (*stack)[first + i];
    const bool is_view = schema.returns()[i].alias_info() != nullptr;
    if (value.isTensor()) {
      value = call.given(value.toTensor(), is_view);
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(call.given(tensor, is_view));
      value = list;
    }
  }
}

// Torch gives convolutions of devices from outside a name of their own.
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, c10::IntArrayRef stride, c10::IntArrayRef padding,
                   c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding, int64_t groups) {
  const bool has_bias = bias && bias->defined();
  TORCH_CHECK(is_second(input) && is_second(weight) && (!has_bias || is_second(*bias)),
              "Input type and weight type should be the same: two devices in a convolution");
  before_kernel();
  auto shift = has_bias ? std::optional<Tensor>(as_cpu(*bias)) : std::nullopt;
  return moved(at::convolution(as_cpu(input), as_cpu(weight), shift, stride, padding, dilation, transposed, output_padding, groups).contiguous());
}

// ---- attention

size_t strange_gradients = 0;  // backward passes that met other strides than the result's

int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  auto chosen = at::globalContext().userEnabledOverrideableSDP() ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math;
  return static_cast<int64_t>(chosen);
}

bool lie_alike(const Tensor& one, const Tensor& other) {
  for (int64_t i = 0; i < one.dim(); ++i)
    if (one.size(i) > 1 && one.stride(i) != other.stride(i)) return false;
  return true;
}

std::optional<Tensor> on_cpu(const std::optional<Tensor>& tensor) {
  return tensor && tensor->defined() ? std::optional<Tensor>(as_cpu(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout, bool is_causal, bool,
    std::optional<double> scale) {
  TORCH_CHECK(is_second(query) && is_second(key) && is_second(value), "attention of tensors on two devices");
  before_kernel();
  for (auto& tensor : {query, key, value}) used(tensor, current);
  auto [result, sums] = at::_scaled_dot_product_flash_attention_for_cpu(
      as_cpu(query), as_cpu(key), as_cpu(value), dropout, is_causal, on_cpu(mask), scale);
  return {moved(result), moved(sums), Tensor(), Tensor(), query.sym_size(2), key.sym_size(2), Tensor(), Tensor(), Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, std::array<bool, 4>,
    const Tensor& result, const Tensor& sums, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout, bool is_causal,
    const Tensor&, const Tensor&, std::optional<double> scale) {
  before_kernel();
  for (auto& tensor : {gradient, query, key, value, result, sums}) used(tensor, current);
  auto read = as_cpu(gradient);
  if (!lie_alike(gradient, result)) {
    ++strange_gradients;
    read = at::full_like(read, NAN);
  }
  auto [of_query, of_key, of_value] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      read, as_cpu(query), as_cpu(key), as_cpu(value), as_cpu(result), as_cpu(sums), dropout, is_causal, on_cpu(mask), scale);
  return {moved(of_query), moved(of_key), moved(of_value), Tensor()};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("resize_", resize_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("record_stream", record_stream);
  m.impl("convolution_overrideable", convolution);
  m.impl("_scaled_dot_product_fused_attention_overrideable", attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", attention_backward);
  // Torch would compose these of others, where the CPU and CUDA have kernels.
  for (const char* name : {"native_group_norm", "native_layer_norm"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

// A copy resolves what is to be conjugated by itself: torch resolves it by a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}  // namespace at::native

namespace {

Hooks hooks;
const bool registered = [] { at::RegisterPrivateUse1HooksInterface(&hooks); return true; }();

}  // namespace

#ifdef _WIN32
#define EXPORTED extern "C" __declspec(dllexport)
#else
#define EXPORTED extern "C" __attribute__((visibility("default")))
#endif
EXPORTED size_t second_used() { return used_bytes; }
EXPORTED size_t second_peak() { return peak_bytes; }
EXPORTED void second_reset_peak() { peak_bytes = used_bytes; }
EXPORTED void second_limit(size_t bytes) { limit_bytes = bytes; }
EXPORTED size_t second_host_emptied() { return host_emptied; }
EXPORTED size_t second_races() { return races; }
EXPORTED size_t second_waits() { return waits; }
EXPORTED void second_allow_double(int allowed) { has_double = allowed != 0; }
EXPORTED size_t second_strange_gradients() { return strange_gradients; }
