"""Datasets on the Hugging Face Hub, through huggingface_hub. The login is its own: HF_TOKEN, or `hf auth login`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from ....errors import reason_of
from .http_client import Client, Status, copy_from, proxy_free_host
from .store import Missing, StoredFile, Temporary, store_fault

ADVICE = "check the name, and that this machine is logged in (hf auth login) if the dataset is private or gated"


class HubStore:
    """The files of a dataset repository, at one commit.

    Args:
        url: hf://user/name, hf://user/name@revision or with a folder behind it.
        hosts: Hosts that the user has named; that of HF_ENDPOINT is one of them.
    """

    def __init__(self, url: str, hosts: frozenset[str]):
        from huggingface_hub import constants

        self.place = url
        owner, _, rest = url.removeprefix("hf://").partition("/")
        name, _, self._folder = rest.partition("/")
        name, _, self._revision = name.partition("@")
        self._repo = f"{owner}/{name}"
        if not owner or not name:
            raise store_fault(url, "it names no dataset", "write hf://user/name, or hf://user/name/folder")
        self._is_offline = constants.HF_HUB_OFFLINE
        self._client = Client({*hosts, proxy_free_host(constants.ENDPOINT)})
        self._commit = ""

    def page(self, token: str) -> tuple[list[StoredFile], str]:
        from huggingface_hub import HfApi

        if self._is_offline:
            raise store_fault(self.place, "HF_HUB_OFFLINE is set, and a dataset on the Hub is listed anew", "unset it")
        with self._as_our_errors():
            api = HfApi()
            self._commit = api.dataset_info(self._repo, revision=self._revision or None).sha or ""
            tree = api.list_repo_tree(
                self._repo, self._folder or None, recursive=True, revision=self._commit, repo_type="dataset"
            )
            prefix = f"{self._folder}/" if self._folder else ""
            return [
                StoredFile(item.path.removeprefix(prefix), size, _stamp(item))
                for item in tree
                if (size := getattr(item, "size", None)) is not None  # a file, not a folder
            ], ""

    def download(self, file: StoredFile, target: IO[bytes], start: int) -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        path = f"{self._folder}/{file.name}" if self._folder else file.name
        url = hf_hub_url(self._repo, path, repo_type="dataset", revision=self._commit or self._revision or None)
        try:
            copy_from(self._client, url, build_hf_headers(), target, start, file.size)
        except Status as error:
            if error.status in (401, 403):
                raise store_fault(self.place, str(error), ADVICE) from error
            raise

    @contextmanager
    def _as_our_errors(self) -> Iterator[None]:
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            if status in (408, 429) or status >= 500:
                raise Temporary(f"HTTP {status}") from error
            raise store_fault(self.place, f"HTTP {status}: {reason_of(error)}", ADVICE) from error
        except (Missing, Temporary):
            raise
        except OSError as error:  # requests' and httpx's errors of connections
            raise Temporary(reason_of(error)) from error
        except Exception as error:
            if type(error).__module__.partition(".")[0] in ("httpx", "httpcore", "requests"):
                raise Temporary(reason_of(error)) from error
            raise


def _stamp(item: Any) -> str:
    large = getattr(item, "lfs", None)
    return str(getattr(large, "sha256", "") or getattr(item, "blob_id", ""))
