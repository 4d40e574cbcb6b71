// Requests to the server of this pack. It knows no DOM.

import { api } from "../../scripts/api.js";

export const post = (body, signal) => ({
  method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" }, signal,
});

// The JSON of an answer. Throws what the server says is wrong.
export async function ask(path, options) {
  const answer = await api.fetchApi(path, options);
  const body = await answer.text();
  if (answer.ok) return JSON.parse(body);
  let error = body;
  try {
    error = JSON.parse(body).error ?? body;
  } catch { /* not JSON: use the text itself */ }
  throw new Error(error || `${answer.status} ${answer.statusText}`);
}
