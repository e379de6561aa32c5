// Reads the Prometheus text format, as far as the page needs it.
"use strict";

/** Samples of a /metrics text: name -> [{labels, value}]. */
function parseMetrics(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = /^([\w:]+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] || "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    if (!samples.has(match[1])) samples.set(match[1], []);
    samples.get(match[1]).push({ labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

class Metrics {
  constructor(text) { this.samples = parseMetrics(text); }

  all(name) { return this.samples.get(name) || []; }

  /** Sum over all label sets, or null when there is none. */
  sum(name) {
    const found = this.all(name);
    return found.length ? found.reduce((sum, s) => sum + s.value, 0) : null;
  }

  /** As sum, the mean. */
  mean(name) {
    const found = this.all(name);
    return found.length ? this.sum(name) / found.length : null;
  }

  /** Mean observation of a histogram, per value of a label: [[value, mean, count]]. */
  means(name, label) {
    const rows = new Map();
    for (const part of ["sum", "count"]) {
      for (const s of this.all(`${name}_${part}`)) {
        const row = rows.get(s.labels[label]) || { sum: 0, count: 0 };
        row[part] += s.value;
        rows.set(s.labels[label], row);
      }
    }
    return [...rows].filter(([, r]) => r.count > 0).map(([v, r]) => [v, r.sum / r.count, r.count]);
  }
}
