"use strict";

// The conversation as the server wants it; what is shown is built beside it.
let messages = [];
let running = null;

const byId = (id) => document.getElementById(id);
const log = byId("log"), input = byId("input"), statusLine = byId("status");
const settings = byId("sampling").elements;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function headers() {
  const found = { "Content-Type": "application/json" };
  if (settings.key.value) found.Authorization = `Bearer ${settings.key.value}`;
  return found;
}

function nearEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function addTurn(role, text) {
  const turn = element("section", `turn ${role}`);
  const body = element("div", "body", text || "");
  turn.append(body);
  log.append(turn);
  log.scrollTop = log.scrollHeight;
  return { turn, body };
}

function addReasoning(view) {
  const box = element("details", "reasoning");
  box.append(element("summary", "", "Reasoning"), element("div"));
  view.turn.prepend(box);
  return box;
}

function addCall(view, call) {
  const box = element("div", "call");
  const text = element("div");
  box.append(text);
  view.turn.append(box);
  return { box, text, show: () => { text.textContent = `${call.function.name}(${call.function.arguments})`; } };
}

// A tool's result is typed in by hand: this page runs nothing on anyone's behalf.
function askForResult(box, call) {
  const form = element("form");
  const result = element("input");
  result.placeholder = "result of this call";
  result.setAttribute("aria-label", `Result of ${call.function.name}`);
  form.append(result, element("button", "", "Return"));
  box.append(form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.remove();
    messages.push({ role: "tool", tool_call_id: call.id, content: result.value });
    addTurn("tool", result.value);
    const asked = messages.findLast((message) => message.tool_calls);
    const answered = messages.filter((message) => message.role === "tool").map((m) => m.tool_call_id);
    if (asked.tool_calls.every((one) => answered.includes(one.id))) answer();
  });
  result.focus();
}

function requestBody() {
  const body = {
    messages: settings.system.value
      ? [{ role: "system", content: settings.system.value }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    chat_template_kwargs: { thinking: byId("thinking").checked },
  };
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if (settings[name].value !== "") body[name] = Number(settings[name].value);
  }
  if (settings.tools.value.trim()) body.tools = JSON.parse(settings.tools.value);
  return body;
}

async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    let end;
    while ((end = buffer.indexOf("\n\n")) >= 0) {
      const line = buffer.slice(0, end);
      buffer = buffer.slice(end + 2);
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

function takeDelta(delta, message, view) {
  if (delta.reasoning_content) {
    view.reasoning ??= addReasoning(view);
    view.reasoning.lastChild.textContent += delta.reasoning_content;
  }
  if (delta.content) {
    message.content += delta.content;
    view.body.textContent = message.content;
  }
  for (const part of delta.tool_calls || []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[part.index] ??=
      { id: part.id, type: "function", function: { name: part.function.name, arguments: "" } });
    view.calls[part.index] ??= addCall(view, call);
    call.function.arguments += part.function.arguments || "";
    view.calls[part.index].show();
  }
}

async function answer() {
  const view = { ...addTurn("assistant", ""), calls: [] };
  const message = { role: "assistant", content: "" };
  const controller = new AbortController();
  running = controller;
  byId("send").hidden = true;
  byId("stop").hidden = false;
  statusLine.textContent = "reading…";
  const started = performance.now();
  let first = 0, usage = null, stopped = false;
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), signal: controller.signal, body: JSON.stringify(requestBody()),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of serverEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices && event.choices[0];
      if (!choice) continue;
      const follow = nearEnd();
      if (!first && Object.keys(choice.delta).some((key) => key !== "role" && choice.delta[key])) {
        first = performance.now();
        statusLine.textContent = "writing…";
      }
      takeDelta(choice.delta, message, view);
      if (follow) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    stopped = error.name === "AbortError";
    if (!stopped) {
      view.turn.append(element("div", "wrong", error.message));
      statusLine.textContent = "";
    }
  }
  running = null;
  byId("send").hidden = false;
  byId("stop").hidden = true;
  if (message.content || message.tool_calls) messages.push(message);
  if (usage && first) {
    const seconds = (performance.now() - first) / 1000;
    const rate = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    const cached = usage.prompt_tokens_details.cached_tokens;
    statusLine.textContent = `${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}, ` +
      `first token after ${Math.round(first - started)} ms, ${usage.completion_tokens} tokens${rate}`;
  } else if (stopped) {
    statusLine.textContent = "stopped";
  }
  if (message.tool_calls && !stopped) {
    message.tool_calls.forEach((call, index) => askForResult(view.calls[index].box, call));
  } else {
    input.focus();
  }
}

function send() {
  const text = input.value.trim();
  if (!text || running) return;
  if (settings.tools.value.trim()) {
    try {
      JSON.parse(settings.tools.value);
    } catch {
      statusLine.textContent = "The tools in the settings are not a JSON list.";
      return;
    }
  }
  input.value = "";
  resize();
  messages.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
}

function resize() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function startOver() {
  if (running) running.abort();
  messages = [];
  log.replaceChildren();
  statusLine.textContent = "";
  input.focus();
}

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
byId("sampling").addEventListener("submit", (event) => event.preventDefault());
byId("stop").addEventListener("click", () => running && running.abort());
byId("new").addEventListener("click", startOver);
input.addEventListener("input", resize);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (running) running.abort();
    byId("settings").open = false;
  }
  if (event.key.toLowerCase() === "k" && event.ctrlKey && event.shiftKey) {
    event.preventDefault();
    startOver();
  }
});
settings.key.addEventListener("change", showModel);

async function showModel() {
  const response = await fetch("/v1/models", { headers: headers() });
  const found = await response.json();
  byId("model").textContent = response.ok ? found.data[0].id : found.error.message;
}
showModel();
