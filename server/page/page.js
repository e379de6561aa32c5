// Fetches /metrics every two seconds and shows it. Facts that do not change come from its labels.
"use strict";

const PERIOD_MS = 2000;
const HISTORY = 60;
const byId = (id) => document.getElementById(id);
const history = { usage: [], speed: [] };
let previous = null;

function show(id, text) { byId(id).textContent = text; }

function count(n) {
  if (n === null || Number.isNaN(n)) return "–";
  return n < 10000 ? Math.round(n).toLocaleString("en") :
    new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 }).format(n);
}

function bytes(n) {
  if (n === null || Number.isNaN(n)) return "–";
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (n >= 1024 && unit < units.length - 1) { n /= 1024; unit += 1; }
  return `${unit ? n.toPrecision(3) : Math.round(n)} ${units[unit]}`;
}

function percent(share, digits = 0) {
  return share === null || Number.isNaN(share) ? "–" : `${(100 * share).toFixed(digits)} %`;
}

function bar(id, share) { byId(id).style.width = `${Math.min(100, Math.max(0, 100 * share))}%`; }

function spark(id, values, most) {
  const svg = byId(id);
  const top = Math.max(most, ...values);
  const width = Math.max(HISTORY / 4, values.length);
  const points = values.map((v, i) => [(i + width - values.length) / (width - 1) * 100,
    top ? 39 - 37 * v / top : 39]);
  if (!points.length) return;
  const line = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");
  svg.setAttribute("viewBox", "0 0 100 40");
  svg.setAttribute("preserveAspectRatio", "none");
  const end = points[points.length - 1][0].toFixed(2);
  const area = `${line}L${end} 40L${points[0][0].toFixed(2)} 40Z`;
  svg.replaceChildren(...[["area", area], ["line", line]].map(([kind, d]) => {
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    path.setAttribute("class", kind);
    path.setAttribute("d", d);
    return path;
  }));
}

/** Difference of a counter since the last fetch, per second. */
function rate(now, name) {
  const value = now.metrics.sum(name);
  if (value === null || !previous) return null;
  const before = previous.metrics.sum(name) || 0;
  return Math.max(0, value - before) / ((now.at - previous.at) / 1000);
}

function push(values, value) {
  values.push(value);
  if (values.length > HISTORY) values.shift();
}

function showCache(m) {
  const capacity = m.sum("fibquant:kv_cache_capacity_tokens");
  const dense = m.sum("fibquant:kv_cache_capacity_tokens_16bit");
  const used = m.sum("fibquant:kv_cache_used_tokens");
  const ratio = m.mean("fibquant:compression_ratio");
  show("used-tokens", count(used));
  show("capacity", count(capacity));
  show("ratio", ratio === null ? "–" : `${ratio.toFixed(2)}×`);
  show("label-capacity", count(capacity));
  show("label-dense", count(dense));
  show("cache-bytes", bytes(m.sum("fibquant:kv_cache_bytes")));
  show("token-bytes", bytes(m.mean("fibquant:bytes_per_token")));
  show("dense-bytes", bytes(m.mean("fibquant:bytes_per_token_16bit")));
  show("used-bytes", bytes(m.sum("fibquant:kv_cache_used_bytes")));
  if (capacity) {
    bar("bar-used", used / capacity);
    bar("bar-dense", dense / capacity);
  }
}

function showLoad(now) {
  const m = now.metrics;
  const usage = m.mean("vllm:kv_cache_usage_perc");
  show("usage", percent(usage, usage !== null && usage < 0.1 ? 1 : 0));
  push(history.usage, usage || 0);
  spark("spark-usage", history.usage, 0.05);

  const speed = rate(now, "vllm:generation_tokens_total");
  if (speed !== null) {
    show("speed", speed < 10 ? speed.toFixed(1) : count(speed));
    show("prompt-speed", count(rate(now, "vllm:prompt_tokens_total")));
    push(history.speed, speed);
    spark("spark-speed", history.speed, 1);
  }

  const queries = m.sum("vllm:prefix_cache_queries_total");
  const hits = m.sum("vllm:prefix_cache_hits_total");
  show("hit-rate", queries ? percent(hits / queries) : "–");
  bar("bar-hits", queries ? hits / queries : 0);
  show("hits", count(hits));
  show("queries", count(queries));
  show("running", count(m.sum("vllm:num_requests_running")));
  show("waiting", count(m.sum("vllm:num_requests_waiting")));
  show("finished", count(m.sum("vllm:request_success_total")));
  show("preemptions", count(m.sum("vllm:num_preemptions_total")));
}

function meanOf(rows) {
  const total = rows.reduce((sum, [, , n]) => sum + n, 0);
  return total ? rows.reduce((sum, [, mean, n]) => sum + mean * n, 0) / total : null;
}

const GATE_TEXTS = {
  passed: "Measured at the start: codes cost this model little.",
  warned: "Measured at the start: codes cost this model much. Calibrate, or take more bits.",
  accepted: "Measured at the start: codes damage this model, and that was accepted.",
  skipped: "Not measured: the fidelity gate was switched off.",
  unmeasured: "Not measured: this model could not be read at the start; its log says why.",
};

function stateOf(m, name) {
  return m.all(name).filter((s) => s.value).map((s) => s.labels.state);
}

function showExpected(m) {
  const kl = m.mean("fibquant:expected_kl");
  const increase = m.mean("fibquant:expected_perplexity_increase");
  const worst = m.all("fibquant:expected_cosine").reduce(
    (a, b) => (a && a.value <= b.value ? a : b), null);
  show("expected-kl", kl === null ? "–" : kl.toPrecision(2));
  show("expected-perplexity", increase === null ? "–" :
    `${increase < 0 ? "−" : "+"}${percent(Math.abs(increase), 1)}`);
  show("expected-worst", worst ? worst.value.toFixed(4) : "–");
  show("expected-layer", worst ? `, layer ${worst.labels.layer}` : "");
  const state = stateOf(m, "fibquant:fidelity_gate")[0];
  show("gate-state", GATE_TEXTS[state] || "–");
}

function showFidelity(m) {
  showExpected(m);
  const isOn = m.sum("fibquant:monitor_enabled") > 0;
  byId("fidelity").hidden = !isOn;
  byId("fidelity-off").hidden = isOn;
  if (!isOn) return;
  const layers = m.means("fibquant:fidelity_cosine", "layer");
  const cosine = meanOf(layers);
  const error = meanOf(m.means("fibquant:fidelity_error", "layer"));
  const worst = m.all("fibquant:monitor_worst_layer_cosine").map((s) => s.value).filter((v) => v);
  show("cosine", cosine === null ? "–" : cosine.toFixed(4));
  show("error", percent(error, 1));
  show("worst", worst.length ? Math.min(...worst).toFixed(3) : "–");

  byId("ages").replaceChildren(...m.means("fibquant:fidelity_cosine_by_age", "age").map(
    ([age, mean, n]) => {
      const row = document.createElement("div");
      row.className = "row";
      const name = document.createElement("span");
      name.textContent = age.replace("s", " s").replace("-", "–").replace(">", "> ");
      const track = document.createElement("div");
      track.className = "track";
      const fill = document.createElement("div");
      fill.className = "fill";
      fill.style.width = `${100 * mean}%`;
      track.append(fill);
      const label = document.createElement("output");
      label.textContent = mean.toFixed(4);
      label.title = `${n} samples`;
      row.append(name, track, label);
      return row;
    }));
  // From a little below the worst layer up to 1: the differences are what one looks for.
  const low = Math.max(0, Math.floor(20 * Math.min(...layers.map(([, mean]) => mean)) - 0.4) / 20);
  show("layers-low", layers.length ? low.toFixed(2) : "");
  byId("layers").replaceChildren(...layers.map(([layer, mean, n]) => {
    const column = document.createElement("div");
    column.style.height = `${Math.max(2, 100 * (mean - low) / (1 - low))}%`;
    column.title = `layer ${layer}: ${mean.toFixed(4)}, ${n} samples`;
    return column;
  }));
  byId("layers").setAttribute("aria-label", "Mean cosine by layer: " +
    layers.map(([layer, mean]) => `${layer}: ${mean.toFixed(3)}`).join(", "));
  show("samples", count(layers.reduce((sum, [, , n]) => sum + n, 0)));
  show("rereads", count(m.sum("fibquant:monitor_rereads_total")));
  show("changed", count(m.sum("fibquant:monitor_changed_total")));
  const steps = m.sum("fibquant:monitor_step_seconds_total");
  show("cost", percent(steps ? m.sum("fibquant:monitor_seconds_total") / steps : null, 2));
}

function showFacts(now) {
  const m = now.metrics;
  const info = (m.all("fibquant:info")[0] || { labels: {} }).labels;
  show("model", `${info.model_name} · ${info.kv_cache_dtype}`);
  const per = (name) => {
    const steps = rate(now, "fibquant:steps_total");
    if (!steps) return "idle";
    const seconds = rate(now, name);  // a GPU's are not measured: an op returns before it ends
    return seconds ? `${(1000 * seconds / steps).toFixed(2)} ms` : "not measured";
  };
  const facts = {
    preset: info.preset, "key code": info.key_code, "value code": info.value_code,
    ...(info.layers ? { layers: info.layers } : {}),
    prefill: info.prefill, "recent window": info.recent_window, kernel: info.kernel,
    "self-check": m.sum("fibquant:self_check_passed") ? "passed" : "switched off",
    "encode, per step": per("fibquant:encode_seconds_total"),
    "attend, per step": per("fibquant:attend_seconds_total"),
    "non-finite vectors": count(m.sum("fibquant:non_finite_vectors_total")),
    version: info.version,
  };
  byId("facts").replaceChildren(...Object.entries(facts).map(([name, value]) => {
    const pair = document.createElement("div");
    const dt = document.createElement("dt");
    dt.textContent = name;
    const dd = document.createElement("dd");
    dd.textContent = value;
    pair.append(dt, dd);
    return pair;
  }));
}

function showHealth(state, text) {
  const pill = byId("health");
  if (pill.dataset.state === state && pill.textContent === text) return;
  pill.dataset.state = state;
  pill.textContent = text;
}

function notice(text) {
  byId("notice").hidden = !text;
  if (byId("notice").textContent !== text) show("notice", text);
}

async function refresh() {
  try {
    const response = await fetch("metrics", { cache: "no-store" });
    if (!response.ok) throw new Error(`/metrics answered ${response.status}`);
    const now = { at: performance.now(), metrics: new Metrics(await response.text()) };
    showLoad(now);
    const m = now.metrics;
    if (m.sum("fibquant:enabled") === 1 && m.all("fibquant:info").length) {
      showCache(m);
      showFidelity(m);
      showFacts(now);
      const state = stateOf(m, "fibquant:monitor_health");
      const worst = ["damaged", "degraded", "healthy"].find((s) => state.includes(s));
      if (worst) showHealth(worst, worst);
      else showHealth("healthy", "serving");
      notice("");
    } else {
      showHealth("unknown", "not compressed");
      notice("The cache of this server holds no FibQuant codes; give --kv-cache-dtype fibquant.");
    }
    previous = now;
  } catch (error) {
    showHealth("lost", "no connection");
  }
  setTimeout(refresh, PERIOD_MS);
}

for (const link of document.querySelectorAll('a[href="#fidelity-meaning"]')) {
  link.addEventListener("click", () => { byId("fidelity-meaning").open = true; });
}

byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" :
    matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
});
refresh();
