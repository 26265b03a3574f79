"use strict";
// The page works without this script. It adds keys, ranks by a click, the time that a task took, drafts, and votes that
// outlive a lost connection: a vote is sent again until the server acknowledges it, which it does once the vote is on
// its disk.
(() => {
  if (!document.getElementById("vote")) return;
  // The second click of a double click must not be a vote on the next task, which nobody can have read by then.
  const UNREAD_MS = 300;
  let form, kind, answers, ranked, isSending, isUnsent, draftName;
  const memory = {
    get(name) { try { return localStorage.getItem(name); } catch { return null; } },
    set(name, value) { try { localStorage.setItem(name, value); } catch { /* private mode: drafts are not kept */ } },
    remove(name) { try { localStorage.removeItem(name); } catch { /* as above */ } },
  };

  function start() {
    form = document.getElementById("vote");
    kind = form.dataset.kind;
    answers = [...form.querySelectorAll(".answer")];
    isSending = isUnsent = false;
    draftName = `draft ${form.elements.form_token.value} ${form.dataset.task}`;
    form.addEventListener("submit", submit);
    form.addEventListener("input", saveDraft);
    for (const use of form.querySelectorAll(".use")) use.addEventListener("click", () => edit(use.closest(".answer")));
    offerDraft();
    if (kind === "rank") startRanks();
    const keys = document.getElementById("keys");
    keys.checked = memory.get("label keys") !== "off";
    keys.addEventListener("change", () => memory.set("label keys", keys.checked ? "on" : "off"));
  }

  // Time in which the page was seen.
  let seen = 0, since = document.hidden ? null : performance.now();
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && since !== null) { seen += performance.now() - since; since = null; }
    else if (!document.hidden && since === null) since = performance.now();
  });
  const seconds = () => ((seen + (since === null ? 0 : performance.now() - since)) / 1000).toFixed(1);

  // Sending.
  function submit(event) {
    event.preventDefault();
    if (isSending || performance.now() < UNREAD_MS) return;
    const button = event.submitter;
    form.elements.seconds.value = seconds();
    const fields = new URLSearchParams(new FormData(form));
    if (button?.name) fields.set(button.name, button.value);
    isSending = true;
    form.setAttribute("aria-busy", "true");
    if (button?.hasAttribute("formaction")) undo(button.formAction, fields);
    else send(form.action, fields);
  }

  async function send(address, fields) {
    for (let wait = 1000; ; wait = Math.min(2 * wait, 10000)) {
      let reason;
      try {
        reason = await post(address, fields);
        if (reason === null) return;
      } catch { reason = "The server cannot be reached."; }
      isUnsent = true;
      say(`Not stored yet: ${reason} Leave this page open: it sends your vote again until it is stored.`);
      await new Promise((resolve) => {
        setTimeout(resolve, wait);
        addEventListener("online", resolve, { once: true });
      });
    }
  }

  // Never sent again: a second request would take back the vote before, too.
  async function undo(address, fields) {
    let reason;
    try { reason = await post(address, fields); } catch { reason = "The server cannot be reached."; }
    if (reason !== null) release(`${reason} Reload the page to see whether the vote was taken back.`);
  }

  // null once the answer has been dealt with, or else why the server could not take it.
  async function post(address, fields) {
    const response = await fetch(address, { method: "POST", body: fields });
    if (response.ok && response.redirected) {
      isUnsent = false;
      memory.remove(draftName);
      location.assign(response.url);
      return null;
    }
    // Parsed, never run: scripts of a parsed document do nothing.
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const message = (page.querySelector(".message-line:not([hidden])") || page.querySelector("main p"))?.textContent;
    if (response.status >= 500) return message || `The server answered ${response.status}.`;
    if (response.status === 409) showStored(page);
    else release(message || `The server answered ${response.status}.`);
    return null;
  }

  function release(message) {
    isSending = isUnsent = false;
    form.removeAttribute("aria-busy");
    say(message);
  }

  function say(message) {
    const offline = document.getElementById("offline");
    offline.hidden = false;
    offline.textContent = message;
  }

  // Another tab has stored a vote on this task: show it, with the reason why this one was refused.
  function showStored(page) {
    saveDraft();
    for (const part of ["header", "main"]) document.querySelector(part).replaceWith(page.querySelector(part));
    start();
    document.querySelector(".message-line").focus();
    scrollTo(0, 0);
  }

  addEventListener("beforeunload", (event) => { if (isUnsent) event.preventDefault(); });
  // A page that comes back from the browser's memory shows what was stored then.
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });

  // Drafts: a closed laptop loses nothing that was typed. A draft belongs to the revision that it would replace; where
  // another vote was stored since, that one is shown, and the draft is offered.
  function draftFields() {
    const { form_token, revision, seconds, ...fields } = Object.fromEntries(new FormData(form));
    return fields;
  }
  function saveDraft() {
    memory.set(draftName, JSON.stringify({ revision: form.elements.revision.value, fields: draftFields() }));
  }
  function offerDraft() {
    let draft;
    try { draft = JSON.parse(memory.get(draftName)); } catch { return; }
    if (!draft?.fields || JSON.stringify(draft.fields) === JSON.stringify(draftFields())) return;
    if (draft.revision === form.elements.revision.value) { restore(draft.fields); return; }
    const offer = document.getElementById("draft");
    offer.hidden = false;
    offer.querySelector("button").addEventListener("click", () => {
      restore(draft.fields);
      if (kind === "rank") startRanks();
      saveDraft();
      offer.hidden = true;
    });
  }
  function restore(fields) {
    const { bad, ...values } = fields;
    if (form.elements.bad) form.elements.bad.checked = Boolean(bad);
    for (const [name, value] of Object.entries(values)) if (form.elements[name]) form.elements[name].value = value;
    if (fields.note) form.elements.note.closest("details").open = true;
  }

  function edit(answer) {
    form.elements.text.value = answer.querySelector(".source").value;
    saveDraft();
    form.elements.text.focus();
  }

  // Ranks: `ranked` has the answers with a rank in the order in which they got it.
  const rankOf = (answer) => Number(answer.querySelector(".ranks input:checked")?.value || 0);
  function startRanks() {
    ranked = answers.filter(rankOf).sort((first, second) => rankOf(first) - rankOf(second));
    for (const answer of answers) {
      answer.onchange = () => setRank(answer, rankOf(answer));
      answer.onclick = (event) => {
        // a finger scrolls: its taps rank by the numbers alone
        const isMouse = matchMedia("(hover: hover)").matches && event.pointerType !== "touch";
        if (isMouse && !event.target.closest("label") && getSelection().isCollapsed) toggle(answer);
      };
    }
    markRanks();
  }
  function nextRank() {
    const used = new Set(ranked.map(rankOf));
    return answers.findIndex((_, place) => !used.has(place + 1)) + 1;
  }
  function toggle(answer, isTie = false) {
    if (rankOf(answer)) setRank(answer, 0);
    else setRank(answer, isTie && ranked.length ? rankOf(ranked.at(-1)) : nextRank());
    saveDraft();
  }
  function setRank(answer, rank) {
    for (const input of answer.querySelectorAll(".ranks input")) input.checked = Number(input.value) === rank;
    ranked = ranked.filter((each) => each !== answer);
    if (rank) ranked.push(answer);
    markRanks();
    const name = `Answer ${answer.dataset.letter}`;
    document.getElementById("status").textContent = rank ? `${name}: rank ${rank}` : `${name} has no rank`;
  }
  function markRanks() {
    const next = nextRank();
    for (const answer of answers) {
      const rank = rankOf(answer);
      answer.classList.toggle("ranked", rank > 0);
      const labels = answer.querySelectorAll(".ranks label");
      labels.forEach((label, place) => label.classList.toggle("next", !rank && place + 1 === next));
    }
  }

  // Keys, which a person can switch off: a screen reader or dictation may use letters.
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.isComposing) return; // a key that is held down would vote on task after task
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) press(event, "Enter");
    else if (!document.getElementById("keys").checked || event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.target.closest("textarea")) return;
    else if (kind !== "rank" || !pressRank(event)) press(event, event.key.toLowerCase());
  });
  function press(event, key) {
    const button = form.querySelector(`button[data-key="${CSS.escape(key)}"]`);
    if (!button || button.disabled) return;
    event.preventDefault();
    form.requestSubmit(button);
  }
  function pressRank(event) {
    const isBack = event.key === "Backspace";
    const answer = isBack ? ranked.at(-1) : answers.find((each) => each.dataset.letter === event.key.toUpperCase());
    if (!answer) return false;
    event.preventDefault();
    toggle(answer, event.shiftKey);
    return true;
  }

  start();
})();
