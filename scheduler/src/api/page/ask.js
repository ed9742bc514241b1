// Requests to the agent, and the question before one that acts.

import { byId, setText } from "./dom.js";

const READ_WITHIN_MS = 20_000;
const ACT_WITHIN_MS = 70_000;

// What the agent answers, or an error in its words.
export async function ask(method, path, body, etag) {
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (etag) headers["if-none-match"] = etag;
  const answer = await fetch(path, {
    method,
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    cache: "no-store",
    redirect: "error",
    signal: AbortSignal.timeout(method === "GET" ? READ_WITHIN_MS : ACT_WITHIN_MS),
  });
  if (answer.status === 304 || answer.status === 204) return { value: null, etag };
  let value = null;
  try {
    value = await answer.json();
  } catch (error) {
    if (answer.ok) throw error;
  }
  if (!answer.ok) throw new Error(value?.error ?? `The answer has status ${answer.status}`);
  return { value, etag: answer.headers.get("etag") };
}

// Asks the person; true if it shall be done.
export function confirmed(question, yes) {
  const dialog = byId("confirm");
  if (dialog.open) return Promise.resolve(false);
  setText(byId("confirm-text"), question);
  setText(byId("confirm-yes"), yes);
  return new Promise((resolve) => {
    let answer = false;
    const close = (value) => () => {
      answer = value;
      dialog.close();
    };
    byId("confirm-yes").onclick = close(true);
    byId("confirm-no").onclick = close(false);
    dialog.onclose = () => resolve(answer);
    dialog.showModal();
    byId("confirm-no").focus();
  });
}

// Asks the person, then the agent, and says in `told` what came of it.
export async function act(question, yes, told, method, path, body) {
  if (!(await confirmed(question, yes))) return false;
  told.className = "quiet";
  setText(told, "asking …");
  try {
    await ask(method, path, body);
    setText(told, "The agent does it.");
    return true;
  } catch (error) {
    told.className = "bad";
    setText(told, error.message);
    return false;
  }
}
