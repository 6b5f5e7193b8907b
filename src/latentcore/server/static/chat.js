"use strict";

// The conversation as the server wants it; what is shown is built beside it.
let messages = [];
let running = null;

const byId = (id) => document.getElementById(id);
const log = byId("log"), input = byId("input"), empty = byId("empty"), statusLine = byId("status");
const settings = byId("sampling").elements;

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const EXAMPLE_TOOLS = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "Get the current weather for a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", description: "Name of the city" } },
      required: ["city"],
    },
  },
}];

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

function headers() {
  const found = { "Content-Type": "application/json" };
  if (settings.key.value) found.Authorization = `Bearer ${settings.key.value}`;
  return found;
}

// What is shown

function nearEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 80;
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
}

// Text, with code set apart where it stands between backticks. Nothing is ever read as HTML.
function showText(body, text) {
  const parts = text.split(/^```.*\n?/m);
  body.replaceChildren(...parts.flatMap((part, index) => {
    if (index % 2) return [element("pre", "", element("span", "", part.replace(/\n$/, "")))];
    const shown = index ? part.replace(/^\n+/, "") : part;
    const kept = index + 1 < parts.length ? shown.replace(/\n+$/, "") : shown;
    if (!kept) return [];
    const pieces = kept.split(/`([^`\n]+)`/).map((piece, odd) => odd % 2 ? element("code", "", piece) : piece);
    return [element("div", "text", ...pieces)];
  }));
}

function addTurn(role, text) {
  empty.hidden = true;
  const body = element("div", "body");
  const turn = element("section", `turn ${role}`, body);
  turn.setAttribute("aria-label", { user: "You", assistant: "The model", tool: "A tool's result" }[role]);
  if (text) showText(body, text);
  log.append(turn);
  toEnd();
  return { turn, body };
}

function addReasoning(view) {
  const title = element("summary", "", "Reasoning…");
  const text = element("div");
  view.turn.prepend(element("details", "reasoning", title, text));
  return { title, text };
}

function addCall(view, call) {
  const asked = element("div", "asked");
  const box = element("div", "call", element("div", "quiet", "Tool call"), asked);
  view.turn.append(box);
  const show = () => asked.replaceChildren(
    element("span", "name", call.function.name), `(${call.function.arguments})`);
  return { box, show };
}

function addMeta(view, parts) {
  view.turn.append(element("p", "meta quiet", parts.filter(Boolean).join(" · ")));
}

// What went wrong, in words for who sits before the page, and a way to try again.
function addFault(view, fault) {
  const again = element("button", "", "Try again");
  again.type = "button";
  again.addEventListener("click", () => {
    if (running) return;
    view.turn.remove();
    answer();
  });
  const box = element("div", "fault",
    element("div", "", element("strong", "", fault.title), element("span", "", fault.message)), again);
  box.setAttribute("role", "alert");
  view.turn.append(box);
}

// A tool's result is typed in by hand: this page runs nothing on anyone's behalf.
function askForResult(box, call) {
  const result = element("input");
  result.placeholder = "What this call returns";
  result.setAttribute("aria-label", `Result of ${call.function.name}`);
  const form = element("form", "", result, element("button", "", "Return"));
  box.append(form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    form.remove();
    messages.push({ role: "tool", tool_call_id: call.id, content: result.value });
    addTurn("tool", result.value);
    const asked = messages.findLast((message) => message.tool_calls);
    const answered = messages.filter((message) => message.role === "tool").map((m) => m.tool_call_id);
    if (asked.tool_calls.every((one) => answered.includes(one.id))) answer();
    else log.querySelector(".call form input").focus();
  });
}

// What goes to the server and comes back

class Fault extends Error {
  constructor(title, text) {
    super(text);
    this.title = title;
  }
}

async function refusal(response) {
  let text = `The server answered with status ${response.status}.`;
  try {
    text = (await response.json()).error.message;
  } catch {
    // Not OpenAI's form: something between this page and the server answered.
  }
  if (response.status === 401) {
    byId("settings").open = true;
    settings.key.focus();
    return new Fault("The server asks for a key", "Put the API key into the settings.");
  }
  if (response.status === 429) {
    const seconds = response.headers.get("Retry-After");
    return new Fault("The server is busy", seconds ? `${text} (in ${seconds} s or later)` : text);
  }
  return new Fault(response.status >= 500 ? "The server failed" : "The request was refused", text);
}

function requestBody() {
  const body = {
    messages: settings.system.value
      ? [{ role: "system", content: settings.system.value }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    chat_template_kwargs: { thinking: byId("thinking").checked },
  };
  for (const name of NUMBERS) {
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
    if (done) throw new TypeError("the stream ended early");
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

// Returns whether the delta held anything of the answer.
function takeDelta(delta, message, view) {
  if (delta.reasoning_content) {
    view.reasoning ??= addReasoning(view);
    view.reasoning.text.append(delta.reasoning_content);
  }
  if (delta.content) {
    message.content += delta.content;
    showText(view.body, message.content);
  }
  for (const part of delta.tool_calls || []) {
    message.tool_calls ??= [];
    const call = (message.tool_calls[part.index] ??=
      { id: part.id, type: "function", function: { name: part.function.name, arguments: "" } });
    view.calls[part.index] ??= addCall(view, call);
    call.function.arguments += part.function.arguments || "";
    view.calls[part.index].show();
  }
  if (view.reasoning && !view.thought && (delta.content || delta.tool_calls)) {
    view.thought = (performance.now() - view.first) / 1000;
    view.reasoning.title.textContent = `Reasoned for ${view.thought.toFixed(1)} s`;
  }
  return Boolean(delta.reasoning_content || delta.content || delta.tool_calls);
}

function setRunning(controller) {
  running = controller;
  // The focus must not fall off the page with the button that had it.
  const held = document.activeElement === byId("stop") || document.activeElement === byId("send");
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
  log.setAttribute("aria-busy", String(Boolean(controller)));
  if (held) (controller ? byId("stop") : input).focus();
}

async function answer() {
  const view = { ...addTurn("assistant", ""), calls: [], first: 0 };
  const message = { role: "assistant", content: "" };
  const controller = new AbortController();
  setRunning(controller);
  view.turn.classList.add("waiting");
  statusLine.textContent = "Reading the prompt…";
  const started = performance.now();
  let pieces = 0, usage = null, reason = null, stopped = false, fault = null;
  // One delta is one token, more or less: good enough for a look while the answer runs.
  const rate = (tokens) => (tokens - 1) / ((performance.now() - view.first) / 1000);
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), signal: controller.signal, body: JSON.stringify(requestBody()),
    });
    if (!response.ok) throw await refusal(response);
    for await (const event of serverEvents(response)) {
      if (event.error) throw new Fault("The answer broke off", event.error.message);
      if (event.usage) usage = event.usage;
      const choice = event.choices && event.choices[0];
      if (!choice) continue;
      reason = choice.finish_reason || reason;
      const follow = nearEnd();
      view.first ||= performance.now();
      if (takeDelta(choice.delta, message, view)) {
        pieces += 1;
        statusLine.textContent = pieces < 4 ? "Writing…" : `Writing… ${rate(pieces).toFixed(1)} tokens/s`;
      }
      if (follow) toEnd();
    }
  } catch (error) {
    stopped = controller.signal.aborted;
    if (!stopped) {
      fault = error instanceof Fault ? error : new Fault("The server does not answer",
        "It may have been stopped, or the network between is down.");
    }
  }
  view.turn.classList.remove("waiting");
  if (!view.turn.isConnected) return;  // the chat was started over meanwhile
  const follow = nearEnd();
  setRunning(null);
  statusLine.textContent = "";
  if (view.reasoning && !view.thought) view.reasoning.title.textContent = "Reasoning, not finished";
  if (fault) {
    addFault(view, fault);
  } else {
    // Calls that were cut off have no results to wait for.
    if (stopped) delete message.tool_calls;
    if (message.content || message.tool_calls) messages.push(message);
    const tokens = usage ? usage.completion_tokens : pieces;
    const cached = usage && usage.prompt_tokens_details.cached_tokens;
    addMeta(view, [
      stopped ? "Stopped" : reason === "length" ? "Cut off: as long as it may be" : "",
      `${usage ? "" : "about "}${tokens} ${tokens === 1 ? "token" : "tokens"}`,
      tokens > 1 ? `${rate(tokens).toFixed(1)} tokens/s` : "",
      view.first ? `first after ${Math.round(view.first - started)} ms` : "",
      usage ? `prompt of ${usage.prompt_tokens}${cached ? `, ${cached} cached` : ""}` : "",
    ]);
  }
  if (message.tool_calls && !fault) {
    message.tool_calls.forEach((call, index) => askForResult(view.calls[index].box, call));
    view.turn.querySelector(".call form input").focus();
  } else if (!byId("settings").open) {
    input.focus();
  }
  if (follow) toEnd();
}

// Keys and buttons

function settingsAreWrong() {
  const form = byId("sampling");
  let wrong = form.checkValidity() ? "" : "A number in the settings is out of range.";
  if (settings.tools.value.trim()) {
    try {
      if (!Array.isArray(JSON.parse(settings.tools.value))) wrong = "The tools in the settings are not a JSON list.";
    } catch {
      wrong = "The tools in the settings are not a JSON list.";
    }
  }
  statusLine.textContent = wrong;
  return Boolean(wrong);
}

function send(text) {
  if (!text || running || settingsAreWrong()) return;
  byId("settings").open = false;
  input.value = "";
  inputChanged();
  messages.push({ role: "user", content: text });
  addTurn("user", text);
  answer();
}

function inputChanged() {
  byId("send").disabled = !input.value.trim();
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function startOver() {
  if (running) running.abort();
  setRunning(null);
  messages = [];
  for (const turn of log.querySelectorAll(".turn")) turn.remove();
  empty.hidden = false;
  statusLine.textContent = "";
  input.focus();
}

async function showModel() {
  const name = byId("model");
  let found = "no answer from the server", fine = false;
  try {
    const response = await fetch("/v1/models", { headers: headers() });
    const body = await response.json();
    fine = response.ok;
    found = fine ? body.data[0].id : response.status === 401 ? "needs an API key" : body.error.message;
  } catch {
    // Said already.
  }
  name.textContent = name.title = found;
  name.classList.toggle("wrong", !fine);
}

byId("composer").addEventListener("submit", (event) => { event.preventDefault(); send(input.value.trim()); });
byId("sampling").addEventListener("submit", (event) => event.preventDefault());
byId("stop").addEventListener("click", () => running && running.abort());
byId("new").addEventListener("click", startOver);
byId("example").addEventListener("click", () => {
  settings.tools.value = JSON.stringify(EXAMPLE_TOOLS, null, 2);
});
for (const idea of document.querySelectorAll(".ideas button")) {
  idea.addEventListener("click", () => send(idea.textContent));
}
input.addEventListener("input", inputChanged);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(input.value.trim());
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    if (running) running.abort();
    if (byId("settings").open) {
      byId("settings").open = false;
      byId("settings").querySelector("summary").focus();
    }
  }
  if (event.key.toLowerCase() === "k" && event.ctrlKey && event.shiftKey) {
    event.preventDefault();
    startOver();
  }
});
document.addEventListener("pointerdown", (event) => {
  if (!byId("settings").contains(event.target)) byId("settings").open = false;
});
settings.key.addEventListener("change", showModel);
showModel();
