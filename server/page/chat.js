// A conversation through /v1/chat/completions, streamed. Nothing of it is stored.
"use strict";

const messages = [];
let running = null;

function addMessage(role, text) {
  const log = document.getElementById("log");
  log.querySelector(".empty")?.remove();
  const element = document.createElement("div");
  element.className = `message ${role}`;
  element.textContent = text;
  log.append(element);
  log.scrollTop = log.scrollHeight;
  return element;
}

/** The texts of a stream of server-sent events. */
async function* deltas(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event.choices?.[0]?.delta?.content || "";
    }
  }
}

async function ask(text) {
  const log = document.getElementById("log");
  addMessage("user", text);
  messages.push({ role: "user", content: text });
  const answer = addMessage("assistant busy", "");
  running = new AbortController();
  setBusy(true);
  const began = performance.now();
  let first = null;
  let number = 0;
  try {
    const key = document.getElementById("key").value;
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) },
      body: JSON.stringify({ messages, stream: true, max_tokens: 512 }),
      signal: running.signal,
    });
    if (response.status === 401) {
      document.getElementById("key-box").open = true;
      document.getElementById("key").focus();
      throw new Error("This server needs an API key: give it below and send again.");
    }
    if (!response.ok) {
      const body = await response.json().catch(() => ({}));
      throw new Error(body.error?.message || `The server answered ${response.status}.`);
    }
    for await (const delta of deltas(response.body)) {
      if (!delta) continue;
      first ??= performance.now();
      number += 1;
      const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
      answer.append(delta);
      if (isAtEnd) log.scrollTop = log.scrollHeight;
      const seconds = (performance.now() - first) / 1000;
      document.getElementById("chat-speed").textContent =
        `first after ${((first - began) / 1000).toFixed(2)} s` +
        (number > 1 ? `, ${((number - 1) / seconds).toFixed(1)} tokens/s` : "");
    }
    messages.push({ role: "assistant", content: answer.textContent });
  } catch (error) {
    if (error.name === "AbortError" && number) {
      messages.push({ role: "assistant", content: answer.textContent });
    } else {
      // Unanswered, the question must not be sent again with the next one.
      messages.pop();
      if (!answer.textContent) answer.remove();
      if (error.name !== "AbortError") addMessage("error", error.message);
      document.getElementById("chat-text").value ||= text;
    }
  } finally {
    answer.classList.remove("busy");
    running = null;
    setBusy(false);
  }
}

function setBusy(isBusy) {
  document.getElementById("send").disabled = isBusy;
  document.getElementById("stop").hidden = !isBusy;
}

document.getElementById("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = document.getElementById("chat-text");
  const text = field.value.trim();
  if (!text || running) return;
  field.value = "";
  ask(text);
});
document.getElementById("chat-text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    document.getElementById("chat").requestSubmit();
  }
});
document.getElementById("stop").addEventListener("click", () => running?.abort());
document.getElementById("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  document.getElementById("log").replaceChildren();
  document.getElementById("chat-speed").textContent = "";
});
