"use strict";
// One task at a time. `ranks[i]` belongs to answer i of the file, 0 = none; `order` is how the answers lie on the page.

const WORDS = {
  en: {
    title: "Rank the answers", prompt: "Prompt", answers: "Answers, best = 1", save: "Save", skip: "Skip", undo: "Undo",
    flag: "Flag", spaces: "Spaces", other: "中文", ask: "Help", tie: "Tie with the answer above",
    rank: (r) => (r ? `rank ${r}` : "no rank"), empty: "(empty)", done: (d, n) => `${d} / ${n}`,
    end: "Everything is labelled. Thank you.", after: "You may close this page; Undo goes back to the last answers.",
    need: "Rank at least two answers, or skip.", high: (k) => `Ranks go from 1 to ${k}.`, none: "Nothing to undo.",
    saved: "Saved.", skipped: "Skipped.", back: "Back to the one before; saving again replaces it.",
    wait: "Saving…", lost: "Not saved: the server does not answer. Start it again, then save once more.",
    stale: "Not saved: the server was started anew. Open the address that it printed.", refused: "Not saved: ",
    help: [["1 – 9", "rank of the answer in focus; equal ranks are a tie"], ["0", "take its rank away"],
      ["↑ ↓", "focus another answer"], ["Shift ↑ ↓, drag", "move it; the order then gives the ranks"],
      ["=", "tie with the answer above"], ["Enter", "save; answers without a rank are left out"],
      ["S", "skip"], ["U", "undo, and then back to the task before"], ["B", "flag for a second look"],
      ["W", "show spaces and line ends"], ["?", "this help"]],
  },
  zh: {
    title: "给回答排序", prompt: "提示", answers: "回答，1 为最好", save: "保存", skip: "跳过", undo: "撤销",
    flag: "标记", spaces: "空格", other: "English", ask: "帮助", tie: "与上一条并列",
    rank: (r) => (r ? `第 ${r} 名` : "未排名"), empty: "（空）", done: (d, n) => `${d} / ${n}`,
    end: "全部标注完毕，谢谢！", after: "可以关闭本页；“撤销”回到上一题。",
    need: "请至少给两条回答排名，或跳过。", high: (k) => `名次为 1 到 ${k}。`, none: "没有可以撤销的操作。",
    saved: "已保存。", skipped: "已跳过。", back: "回到上一题；再次保存会替换原来的结果。",
    wait: "正在保存……", lost: "未保存：服务器没有响应。请重新启动后再保存一次。",
    stale: "未保存：服务器已重新启动，请打开它给出的新地址。", refused: "未保存：",
    help: [["1 – 9", "给当前回答定名次；名次相同即并列"], ["0", "取消名次"], ["↑ ↓", "切换当前回答"],
      ["Shift ↑ ↓ 或拖动", "移动回答，名次按位置重排"], ["=", "与上一条并列"], ["回车", "保存；未排名的回答不计入"],
      ["S", "跳过"], ["U", "撤销，再按回到上一题"], ["B", "标记待复查"], ["W", "显示空格与换行"], ["?", "本帮助"]],
  },
};
const at = (id) => document.getElementById(id);
let language = localStorage.getItem("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let task = null, order = [], ranks = [], past = [], flagged = false, spaces = false, began = 0, busy = false;
let said = ["", false];
const words = () => WORDS[language];

function say(key, bad = false, more = "") {
  said = [key, bad, more];
  const text = key ? words()[key] : "";
  at("status").textContent = (typeof text === "function" ? text(task.responses.length) : text) + more;
  at("status").classList.toggle("bad", bad);
}

function shown(text) {
  if (!spaces) return text;
  return text.replace(/[\p{C}]/gu, (c) => "\t\n".includes(c) ? c : `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`)
    .replace(/ /g, "·\u200b").replace(/\t/g, "⇥\t").replace(/\n/g, "⏎\n");
}

// ---- drawing ----

function element(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function card(i) {
  const li = element("li", "", "");
  li.dataset.answer = i;
  li.tabIndex = 0;
  const tie = element("button", "tie", "");
  tie.type = "button";
  tie.tabIndex = -1;
  tie.addEventListener("click", () => { li.focus(); tieAbove(i); });
  li.append(element("span", "rank", ""), element("div", "text", ""), tie);
  li.addEventListener("pointerdown", (event) => grab(event, li, i));
  return li;
}

function draw() {
  const w = words();
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = w.title;
  for (const name of ["save", "skip", "undo", "flag", "spaces", "ask"]) at(name).textContent = w[name];
  at("language").textContent = w.other;
  at("prompt-name").textContent = w.prompt;
  at("answers-name").textContent = w.answers;
  at("flag").setAttribute("aria-pressed", flagged);
  at("spaces").setAttribute("aria-pressed", spaces);
  const list = document.createElement("dl");
  for (const [key, what] of w.help) list.append(element("dt", "", key), element("dd", "", what));
  at("help").replaceChildren(list);
  at("end").children[0].textContent = w.end;
  at("end").children[1].textContent = w.after;
  if (task) drawTask(w);
  say(...said);
}

function drawTask(w) {
  const open = task.task !== null;
  at("work").hidden = !open;
  at("end").hidden = open;
  at("progress").textContent = w.done(task.done, task.total);
  at("who").textContent = task.annotator;
  at("bar").setAttribute("aria-valuenow", task.done);
  at("bar").setAttribute("aria-valuemax", task.total);
  at("filled").style.width = `${(100 * task.done) / Math.max(1, task.total)}%`;
  for (const name of ["save", "skip", "flag"]) at(name).disabled = !open;
  at("undo").disabled = !past.length && !task.previous;
  at("prompt").textContent = shown(task.prompt);
  order.forEach((i, place) => {
    const li = cardOf(i), text = task.responses[i];
    if (at("answers").children[place] !== li) {
      const focused = li === document.activeElement;
      at("answers").insertBefore(li, at("answers").children[place]);
      if (focused) li.focus({ preventScroll: true });
    }
    li.classList.toggle("ranked", ranks[i] > 0);
    li.children[0].dataset.rank = ranks[i] || "⠿";
    li.children[0].setAttribute("aria-label", w.rank(ranks[i]));
    li.children[0].setAttribute("role", "img");
    li.children[1].textContent = text === "" ? w.empty : shown(text);
    li.children[2].title = w.tie;
    li.children[2].setAttribute("aria-label", w.tie);
  });
}

const cardOf = (i) => at("answers").querySelector(`[data-answer="${i}"]`);

// ---- changing ranks ----

function change(step) {
  past.push({ order: [...order], ranks: [...ranks] });
  step();
  keep();
  say("");
  draw();
}

function rank(i, value) {
  if (value > task.responses.length) return say("high", true);
  change(() => { ranks[i] = value; });
}

function tieAbove(i) {
  const above = order[order.indexOf(i) - 1];
  if (above === undefined || !ranks[above]) return;
  change(() => { ranks[i] = ranks[above]; });
}

function byPlace() {
  order.forEach((i, place) => { ranks[i] = place + 1; });
}

function move(i, by) {
  const from = order.indexOf(i), to = from + by;
  if (to < 0 || to >= order.length) return;
  change(() => { order.splice(from, 1); order.splice(to, 0, i); byPlace(); });
  cardOf(i).scrollIntoView({ block: "nearest" });
}

function undo() {
  if (past.length) {
    ({ order, ranks } = past.pop());
    keep();
    say("");
    draw();
  } else if (task.previous) {
    load(task.previous).then(() => say("back"));
  } else {
    say("none");
  }
}

// A pointer takes a card along; a finger scrolls the page unless it starts on the rank.
function grab(event, li, i) {
  const touch = event.pointerType === "touch" && !event.target.classList.contains("rank");
  if (event.button || touch || event.target.closest("button")) return;
  event.preventDefault();
  li.focus({ preventScroll: true });
  const before = { order: [...order], ranks: [...ranks] }, start = event.clientY;
  let far = false;
  const follow = (e) => {
    far ||= Math.abs(e.clientY - start) > 5;
    if (!far) return;
    li.classList.add("moving");
    const others = order.filter((j) => j !== i);
    const place = others.filter((j) => {
      const box = cardOf(j).getBoundingClientRect();
      return box.top + box.height / 2 < e.clientY;
    }).length;
    if (order.indexOf(i) !== place) {
      others.splice(place, 0, i);
      order = others;
      byPlace();
      draw();
    }
  };
  const stop = (e) => {
    for (const [name, f] of [["pointermove", follow], ["pointerup", stop], ["pointercancel", stop]]) removeEventListener(name, f);
    li.classList.remove("moving");
    if (e.type === "pointercancel") {
      ({ order, ranks } = before);
    } else if (far) {
      byPlace();
      past.push(before);
      keep();
      say("");
    }
    draw();
  };
  for (const [name, f] of [["pointermove", follow], ["pointerup", stop], ["pointercancel", stop]]) addEventListener(name, f);
}

// ---- talking to the server ----

const keep = () => sessionStorage.setItem(task.task, JSON.stringify({ order, ranks }));

async function load(id = "") {
  const reply = await fetch(`/api/task${id ? `?task=${id}` : ""}`);
  if (!reply.ok) return say(reply.status === 403 ? "stale" : "lost", true);
  task = await reply.json();
  past = [];
  flagged = task.flags.length > 0;
  order = [...task.shown];
  ranks = task.ranks || task.responses.map(() => 0);
  const draft = JSON.parse(sessionStorage.getItem(task.task) || "null");
  if (draft) ({ order, ranks } = draft);
  at("answers").replaceChildren(...order.map(card));
  began = performance.now();
  draw();
  scrollTo(0, 0);
  if (order.length) cardOf(order[0]).focus({ preventScroll: true });
}

async function save(values, word) {
  if (busy || !task || task.task === null) return;
  busy = true;
  say("wait");
  const ms = Math.round(performance.now() - began);
  const body = JSON.stringify({ task: task.task, ranks: values, ms, flags: flagged ? ["flag"] : [] });
  try {
    const reply = await fetch("/api/rank", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (!reply.ok) {
      if (reply.status === 403) say("stale", true);
      else say("refused", true, await reply.text());
      return;
    }
    sessionStorage.removeItem(task.task);
    await load();
    say(word);
  } catch {
    say("lost", true);
  } finally {
    busy = false;
  }
}

function submit() {
  if (!task || task.task === null) return;
  if (ranks.filter((r) => r).length < 2) say("need", true);
  else save(ranks, "saved");
}

// ---- keys and buttons ----

const skip = () => save(ranks.map(() => 0), "skipped");
const flag = () => { flagged = !flagged; draw(); };
const toggleSpaces = () => { spaces = !spaces; draw(); };
function help() {
  at("help").hidden = !at("help").hidden;
  at("ask").setAttribute("aria-expanded", !at("help").hidden);
  if (!at("help").hidden) at("help").scrollIntoView({ block: "nearest" });
}
const BUTTONS = { save: submit, skip, undo, flag, spaces: toggleSpaces, ask: help };
for (const [name, f] of Object.entries(BUTTONS)) at(name).addEventListener("click", f);
at("language").addEventListener("click", () => {
  language = language === "zh" ? "en" : "zh";
  localStorage.setItem("language", language);
  draw();
});
const KEYS = { s: skip, u: undo, b: flag, w: toggleSpaces, "?": help, Enter: submit };

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !task || busy) return;
  if (event.target.closest("button") && ["Enter", " "].includes(event.key)) return;
  const li = event.target.closest("[data-answer]"), i = li ? Number(li.dataset.answer) : -1;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const by = { ArrowUp: -1, ArrowDown: 1 }[key];
  if (li && /^[0-9]$/.test(key)) rank(i, Number(key));
  else if (li && key === "=") tieAbove(i);
  else if (li && by && event.shiftKey) move(i, by);
  else if (li && by) (cardOf(order[order.indexOf(i) + by]) || li).focus();
  else if (KEYS[key] && !event.repeat && (task.task !== null || "u?w".includes(key))) KEYS[key]();
  else return;
  event.preventDefault();
});

history.replaceState(null, "", "/");
draw();
load().catch(() => say("lost", true));
