// Requests whose answers take long: one JSON object per line, progress first, then the result. It knows no DOM.

import { api } from "../../scripts/api.js";
import { post } from "./requests.js";

// Splits a text that arrives in pieces into its lines.
export class Lines {
  rest = "";

  take(piece) {
    const lines = (this.rest + piece).split("\n");
    this.rest = lines.pop();
    return lines.filter(Boolean);
  }
}

// The result of POST path. onProgress(done, total) is called meanwhile. signal: of an AbortController, ends the work.
export async function work(path, body, onProgress, signal) {
  const answer = await api.fetchApi(path, post(body, signal));
  if (!answer.ok) throw new Error((await answer.text()) || `${answer.status} ${answer.statusText}`);
  const [reader, decoder, lines] = [answer.body.getReader(), new TextDecoder(), new Lines()];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer is incomplete; see ComfyUI's log");
    for (const line of lines.take(decoder.decode(value, { stream: true }))) {
      const message = JSON.parse(line);
      if (message.error) throw new Error(message.error);
      if ("result" in message) return message.result;
      onProgress(message.done, message.total);
    }
  }
}
