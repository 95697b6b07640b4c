"""Document, style and script of `page.py`, all below `.semtoken`: a notebook keeps its own style."""

STYLE = """
.semtoken, body:has(> .semtoken) {
--page: #fff; --text: #1c2026; --soft: #59616c; --band: #f3f5f8; --merged: #2f7de1; --kept: #a85400; --guard: #6a7380;
background: var(--page); color: var(--text); margin: 0;
@media (prefers-color-scheme: dark) {
--page: #14171b; --text: #e8ebef; --soft: #a0a9b4; --band: #1d2228;
--merged: #4c9aff; --kept: #f2a65a; --guard: #8d97a4; }
}
.semtoken {
color-scheme: light dark; container-type: inline-size; position: relative; max-width: 84rem; margin: auto;
padding: 1rem; font: 16px/1.5 system-ui, "Segoe UI", "Liberation Sans", sans-serif;
&, * { box-sizing: border-box; }
[hidden] { display: none; }
h1 { font-size: 1.35rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: .95rem; margin: 0 0 .3rem; }
p, small, .ticks, .facts dt { color: var(--soft); font-size: .8rem; margin: .2rem 0; }
.bar { position: sticky; top: 0; z-index: 2; background: var(--page); padding: .4rem 0; }
.bar > *, .ends { display: flex; justify-content: space-between; max-width: 40rem; }
label { font-weight: 600; }
input { width: 100%; margin: .3rem 0 0; accent-color: var(--merged); }
.ticks span { width: 1.1rem; text-align: center; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.4rem, 1fr)); gap: .5rem;
margin: .5rem 0 1.2rem; }
.facts div { background: var(--band); border-radius: 8px; padding: .25rem .6rem .35rem; }
dt { color: var(--soft); font-weight: 400; }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
aside { display: grid; gap: 1.2rem; margin-bottom: 1.4rem; align-content: start; }
ul { list-style: none; margin: 0; padding: 0; font-size: .86rem; line-height: 1.95; }
svg { display: block; width: 100%; height: 7rem; background: var(--band); border-radius: 6px; cursor: pointer; }
path { fill: var(--merged); opacity: .6; }
rect { fill: var(--kept); shape-rendering: crispEdges; }
table { width: 100%; font-size: .8rem; line-height: 1.3; border-spacing: 0; }
th, td { padding: 0 .4rem 0 0; background: none; border: 0; }
th { width: 3.6rem; font-weight: 400; text-align: right; color: var(--soft); }
td { display: flex; align-items: center; gap: .35rem; }
td i { background: var(--merged); height: .7rem; min-width: 1px; }
tr:first-child i { background: var(--kept); }
.text { line-height: 1.95; outline-offset: .4rem; min-width: 0; }
.part { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; padding: 0 3px;
content-visibility: auto; contain-intrinsic-size: auto 20rem; }
.slot { scroll-margin: 6rem 0; margin-right: 1px; padding: 1px 0; }
.merged { background: color-mix(in srgb, var(--merged) calc(4% + var(--h) * 40%), var(--page)); padding: 1px 2px;
margin-left: 1px; border-radius: 4px; box-shadow: inset 0 0 0 1px color-mix(in srgb, var(--merged) 70%, var(--page)); }
.kept { border-bottom: 2px solid color-mix(in srgb, var(--kept) calc(25% + var(--h) * 75%), var(--page)); }
.guarded { border-bottom: 2px dotted var(--guard); }
.on { outline: 2px solid var(--text); outline-offset: 1px; }
u { text-decoration: underline 1px; text-underline-offset: 3px; }
.line::after { content: "\\21b5"; font-size: .75em; opacity: .7; }
.bit::after { content: "\\b7"; opacity: .6; }
.tip { position: absolute; z-index: 3; width: min(24rem, calc(100% - 1rem)); padding: .6rem .75rem;
pointer-events: none; background: var(--page); border: 1px solid var(--guard); border-radius: 8px;
box-shadow: 0 4px 18px #0005; font-size: .86rem; line-height: 1.4; }
.tip dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .7rem; margin: .35rem 0 .5rem; }
.chips { display: flex; flex-wrap: wrap; gap: .25rem; }
.chips span { background: var(--band); border-radius: 4px; padding: 0 .3rem; white-space: pre; overflow: hidden; }
@container (min-width: 56rem) {
.both { display: grid; grid-template-columns: minmax(0, 1fr) 21rem; gap: 2.2rem; }
aside { grid-area: 1 / 2; position: sticky; top: 5.5rem; max-height: calc(100vh - 6rem); overflow: auto; }
}
@media print { print-color-adjust: exact; .bar, aside { position: static; } .tip { display: none; } }
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-@DIGEST@'">
<title>@TITLE@</title>
</head>
<body>
<main class="semtoken">
<style>@STYLE@</style>
<h1>@TITLE@</h1>
<noscript><p>This page draws itself: allow its script, which loads nothing.</p></noscript>
<div class="bar"><label><span>Tokens per slot</span><output></output></label>
<input type="range" min="0" aria-label="tokens per slot"><div class="ticks" aria-hidden="true"></div></div>
<dl class="facts"></dl>
<div class="both">
<aside>
<section><h2>How to read it</h2><ul>
<li><span class="merged" style="--h:.1">several tokens</span> <span class="merged" style="--h:1">in a slot</span>:
stronger where the entropy is higher</li>
<li><span class="merged" style="--h:.4">in it <u>the token</u></span> that stands for the others</li>
<li><span class="kept" style="--h:.1">a slot</span> <span class="kept" style="--h:1">each</span>: kept fine;
bolder where their span's entropy is higher</li>
<li><span class="guarded">protected</span>: special, first, last, marked or read</li></ul>
<p>Point at a slot, tap it, or walk with the arrow keys.</p></section>
<section><h2>Entropy along the prompt</h2><svg preserveAspectRatio="none" role="img"></svg>
<p class="ends"><span>token 0</span><span></span></p><p class="caption"></p></section>
<section><h2>Slots by length</h2><table><tbody></tbody></table></section>
</aside>
<div class="text" lang="" tabindex="0" role="group" aria-label="the prompt; arrow keys walk from slot to slot"></div>
</div>
<div class="tip" role="status" hidden></div>
<script type="application/json">@DATA@</script>
<script>@SCRIPT@</script>
</main>
</body>
</html>
"""

SCRIPT = r"""
for (const root of document.querySelectorAll("main.semtoken:not([data-ready])")) {
  root.dataset.ready = "yes";
  const find = (name) => root.querySelector(name);
  const { pieces, reasons, plans, pool, shown, steps } = JSON.parse(find("script").textContent);
  const [text, tip, slider, plot] = [".text", ".tip", "input", "svg"].map(find);
  const count = pieces.length, names = Object.keys(reasons), whole = (x) => x.toLocaleString("en");
  let view, slots, at = null;

  const make = (name, kind, ...content) => {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    made.append(...content);
    return made;
  };
  const pairs = (facts) => Object.entries(facts).map(([name, value]) =>
    [make("dt", "", name), make("dd", "", make("bdi", "", value))]);
  const bytes = (i) => Uint8Array.from(atob(pool[i]), (c) => c.charCodeAt(0));
  const flags = (i) => { const b = bytes(i); return (t) => (b[t >> 3] >> (7 - (t & 7))) & 1; };
  const numbers = (i) => i === null ? null : Float32Array.from(new Int16Array(bytes(i).buffer), (x) => x / steps);
  // Parts of the prompt: their first tokens, the part of each token, the end and the length of a part.
  const cut = (i) => {
    const opens = flags(i), first = [], of = [], end = (p) => first[p + 1] ?? count;
    for (let t = 0; t < count; t++) { if (opens(t)) first.push(t); of.push(first.length - 1); }
    return { first, of, end, length: (p) => end(p) - first[p] };
  };
  const reasonOf = (t) => names[view.reason[t]];
  const kindOf = (t) => ({ merged: "merged", budget: "kept", alone: "kept" })[reasonOf(t)] ?? "guarded";
  const stands = (t) => view.mode === "representative" && view.length(view.of[t]) > 1 && view.carries(t);
  const greatest = (values, floor) => values.reduce((a, b) => Math.max(a, b), floor);

  const choose = (number) => {
    const plan = plans[number];
    tell(null);
    view = { ...plan, ...cut(plan.slots), candidates: cut(plan.candidates), carries: flags(plan.carriers),
      positions: new Int32Array(bytes(plan.positions).buffer), reason: bytes(plan.reason),
      entropy: numbers(plan.entropy), similarity: numbers(plan.similarity) };
    find("output").textContent = plan.ratio;
    slider.setAttribute("aria-valuetext", `${plan.ratio} tokens per slot, ${view.first.length} slots`);
    drawText();
    drawFigures();
    drawEntropy();
  };

  const drawText = () => {
    const all = new DocumentFragment(), known = view.entropy?.filter(Boolean) ?? [];
    const high = greatest(known, 1e-6), low = high - greatest(known.map((x) => high - x), 1e-6);
    let part = null, since = 0;
    slots = view.first.map((first, s) => {
      const slot = make("span", `slot ${kindOf(first)}`);
      slot.dataset.s = s;
      slot.style = `--h:${view.entropy ? Math.max(0, (view.entropy[first] - low) / (high - low)).toFixed(2) : .3}`;
      for (let t = first; t < view.end(s); t++) {
        const into = stands(t) ? slot.appendChild(make("u")) : slot;
        pieces[t].split("\n").forEach((line, i) => into.append(...(i ? [make("i", "line"), "\n", line] : [line])));
      }
      if (!slot.textContent) slot.append(make("i", "bit"));
      if (!part) { all.append(part = make("div", "part")); since = s; }
      part.append(slot);
      // A new block from time to time: it is laid out when it comes into sight.
      if (s - since > 150 && slot.textContent.endsWith("\n")) part = null;
      return slot;
    });
    text.replaceChildren(all);
  };

  const drawFigures = () => {
    const tokens = { merged: 0, kept: 0, guarded: 0 }, kept = view.first.length;
    for (let t = 0; t < count; t++) tokens[kindOf(t)]++;
    const share = (kind) => `${(100 * tokens[kind] / count).toFixed(1)} %`;
    const lengths = view.first.map((_, s) => view.length(s)), longest = greatest(lengths, 1);
    const facts = { tokens: whole(count), slots: whole(kept), "tokens per slot": (count / kept).toFixed(2),
      "tokens merged": share("merged"), "kept fine": share("kept"), "protected or read": share("guarded"),
      "longest slot": `${longest} tokens` };
    const met = kept <= view.budget ? "met" : "not met: protected tokens or the span cap forbid it";
    if (view.budget < count) facts.budget = `${whole(view.budget)} slots, ${met}`;
    find(".facts").replaceChildren(...pairs(facts).map((pair) => make("div", "", ...pair)));

    const size = Math.ceil(longest / 16), bins = Array(Math.ceil(longest / size)).fill(0);
    for (const length of lengths) bins[Math.ceil(length / size) - 1]++;
    find("tbody").replaceChildren(...bins.map((number, b) => {
      const bar = make("i"), head = make("th", "", size === 1 ? b + 1 : `${b * size + 1}-${(b + 1) * size}`);
      head.scope = "row";
      bar.style.width = `calc((100% - 3.5rem) * ${number / Math.max(...bins)})`;
      return make("tr", "", head, make("td", "", bar, whole(number)));
    }));
  };

  const drawEntropy = () => {
    const bins = Math.min(240, count), [of, sums, kept] = [0, 0, 0].map(() => Array(bins).fill(0));
    for (let t = 0; t < count; t++) {
      const b = Math.floor(t * bins / count);
      of[b]++;
      sums[b] += view.entropy?.[t] ?? 0;
      kept[b] += view.length(view.of[t]) === 1;
    }
    const means = sums.map((sum, b) => sum / of[b]), highest = greatest(means, 1e-6);
    const draw = (name, fields) => {
      const drawn = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const key in fields) drawn.setAttribute(key, fields[key]);
      return drawn;
    };
    const line = means.map((mean, b) => `L${b} ${80 - 74 * mean / highest}h1`).join("");
    plot.replaceChildren(draw("path", { d: `M0 80${line}V80Z` }), ...kept.map((sum, x) =>
      draw("rect", { x, y: 86, width: 1, height: 14, "fill-opacity": sum / of[x] })));
    plot.setAttribute("viewBox", `0 0 ${bins} 100`);
    find(".ends").lastChild.textContent = `token ${whole(count - 1)}`;
    const peak = means.indexOf(highest), place = whole(Math.ceil(peak * count / bins));
    const top = !view.entropy ? "No encoder ran." : peak < 0 ? "It is 0 everywhere." :
      `Highest: ${highest.toFixed(3)}, around token ${place}.`;
    find(".caption").textContent = `${top} Below: the share of tokens with a slot of their own.`;
    plot.setAttribute("aria-label", find(".caption").textContent);
  };

  const tell = (s) => {
    slots?.[at]?.classList.remove("on");
    at = s;
    tip.hidden = s === null;
    if (s === null) return;
    slots[s].classList.add("on");
    const { candidates, entropy, similarity } = view, first = view.first[s], last = view.end(s) - 1;
    const c = candidates.of[first], low = candidates.first[c], high = candidates.end(c) - 1;
    const range = (a, b) => a === b ? `token ${whole(a)}` : `${b - a + 1} tokens, ${whole(a)} to ${whole(b)}`;
    const visible = (t) => pieces[t].replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "part of a character";
    const facts = { slot: `${whole(s)} of ${whole(slots.length)}`, holds: range(first, last) };
    facts.position = whole(view.positions[s]);
    const chips = make("div", "chips");
    for (let t = first; t <= last; t++) {
      if (stands(t)) facts["read as"] = visible(t);
      const chip = make("span", "", make("bdi", "", visible(t)));
      if (similarity) chip.append(make("small", "", ` ${similarity[t].toFixed(2)}`));
      if (t < first + 24) chips.append(chip);
    }
    if (low !== first || high !== last) facts["from span"] = range(low, high);
    if (entropy) facts.entropy = entropy[first].toFixed(3);
    tip.replaceChildren(make("b", "", reasons[reasonOf(first)]), make("dl", "", ...pairs(facts).flat()), chips);
    if (similarity) tip.append(make("small", "", `beside each token: its similarity to token ${whole(low)}`));
    const box = slots[s].getClientRects()[0], frame = root.getBoundingClientRect(), height = tip.offsetHeight + 8;
    const top = box.bottom + height < innerHeight || box.top < height ? box.bottom + 8 : box.top - height;
    tip.style.left = `${Math.max(8, Math.min(box.left - frame.left, frame.width - tip.offsetWidth - 8))}px`;
    tip.style.top = `${top - frame.top}px`;
  };

  const go = (s, block) => { slots[s].scrollIntoView({ block }); tell(s); };
  const point = (event) => {
    const slot = event.target.closest(".slot"), s = slot ? +slot.dataset.s : null;
    if (s !== at && (event.type === "click" || event.pointerType === "mouse")) tell(s);
  };
  // Not `pointerover`, which scrolling causes, too.
  for (const name of ["pointermove", "pointerleave", "click"]) text.addEventListener(name, point);
  text.addEventListener("blur", () => tell(null));
  text.addEventListener("keydown", (event) => {
    const end = slots.length - 1, from = at ?? -1;
    const to = { ArrowRight: Math.min(from + 1, end), ArrowLeft: Math.max(from - 1, 0), Home: 0, End: end }[event.key];
    if (event.key === "Escape") tell(null);
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    go(to, "nearest");
  });
  plot.addEventListener("click", (event) => {
    const box = plot.getBoundingClientRect(), t = Math.floor(count * (event.clientX - box.left) / box.width);
    go(view.of[Math.max(0, Math.min(count - 1, t))], "center");
  });
  slider.max = plans.length - 1;
  slider.value = shown;
  slider.addEventListener("input", () => choose(+slider.value));
  find(".ticks").append(...plans.map((plan) => make("span", "", plan.ratio)));
  find(".bar").hidden = plans.length === 1;
  if (count) choose(shown);
}
"""

__all__ = ["PAGE", "SCRIPT", "STYLE"]
