"use strict";
// The page works without this script. It adds keys, the time that a task took, drafts, and votes that outlive a lost
// connection: a vote is sent again until the server acknowledges it, which it does once the vote is on its disk.
(() => {
  const form = document.getElementById("vote");
  if (!form) return;
  const kind = form.dataset.kind;
  const draftName = `draft ${form.elements.form_token.value} ${form.dataset.task}`;
  const remembered = {
    get(name) { try { return localStorage.getItem(name); } catch { return null; } },
    set(name, value) { try { localStorage.setItem(name, value); } catch { /* private mode: drafts are not kept */ } },
    remove(name) { try { localStorage.removeItem(name); } catch { /* as above */ } },
  };

  // Time in which the page was seen.
  let seen = 0, since = document.hidden ? null : performance.now();
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && since !== null) { seen += performance.now() - since; since = null; }
    else if (!document.hidden && since === null) since = performance.now();
  });
  const seconds = () => ((seen + (since === null ? 0 : performance.now() - since)) / 1000).toFixed(1);

  // Sending.
  const offline = document.getElementById("offline");
  let isSending = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (isSending) return;
    const button = event.submitter;
    form.elements.seconds.value = seconds();
    const fields = new URLSearchParams(new FormData(form));
    if (button?.name) fields.set(button.name, button.value);
    isSending = true;
    form.setAttribute("aria-busy", "true");
    send(button?.formAction || form.action, fields);
  });

  async function send(address, fields) {
    for (let attempt = 0; ; attempt += 1) {
      try {
        const response = await fetch(address, { method: "POST", body: fields, redirect: "follow" });
        if (response.ok && response.redirected) {
          remembered.remove(draftName);
          location.assign(response.url);
          return;
        }
        if (response.status < 500) { show(await response.text()); return; }
        throw new Error(`the server answered ${response.status}`);
      } catch (error) {
        offline.hidden = false;
        offline.textContent = `Not stored yet: ${error.message}. Your vote is kept on this page and sent again.`;
        await new Promise((resolve) => setTimeout(resolve, Math.min(1000 * 2 ** attempt, 10000)));
      }
    }
  }

  // A refused vote: the page that came says why. It is parsed, never run: scripts of a parsed document do nothing.
  function show(html) {
    const page = new DOMParser().parseFromString(html, "text/html");
    const reason = page.querySelector(".message-line:not([hidden])") || page.querySelector("main");
    offline.hidden = false;
    offline.textContent = reason.textContent.trim();
    const revision = page.querySelector("[name=revision]");
    if (revision) form.elements.revision.value = revision.value;
    isSending = false;
    form.removeAttribute("aria-busy");
    offline.scrollIntoView({ block: "center" });
  }

  // Drafts of texts: a closed laptop loses nothing that was typed.
  const texts = [...form.querySelectorAll("textarea[name]")];
  const saved = JSON.parse(remembered.get(draftName) || "{}");
  for (const text of texts) if (saved[text.name]) text.value = saved[text.name];
  form.addEventListener("input", () => {
    remembered.set(draftName, JSON.stringify(Object.fromEntries(texts.map((text) => [text.name, text.value]))));
  });
  for (const use of form.querySelectorAll(".use")) {
    use.hidden = false;
    use.addEventListener("click", () => {
      form.elements.text.value = use.closest(".answer").querySelector(".source").value;
      form.elements.text.dispatchEvent(new Event("input", { bubbles: true }));
      form.elements.text.focus();
    });
  }

  // Who has read what a good answer is need not see it with every task.
  const guide = document.querySelector(".guide");
  if (guide) {
    guide.open = remembered.get("label guide") !== "closed";
    guide.addEventListener("toggle", () => remembered.set("label guide", guide.open ? "open" : "closed"));
  }

  // Ranks by letters, best first.
  const answers = [...form.querySelectorAll(".answer")];
  const rankOf = (answer) => Number(answer.querySelector(".ranks input:checked")?.value || 0);
  const order = [];
  function rank(letter, isTie) {
    const answer = answers.find((each) => each.dataset.letter.toLowerCase() === letter);
    if (!answer || rankOf(answer)) return;
    const last = order.length ? rankOf(order[order.length - 1]) : 0;
    setRank(answer, isTie && last ? last : last + 1);
    order.push(answer);
  }
  function setRank(answer, value) {
    for (const input of answer.querySelectorAll(".ranks input")) input.checked = Number(input.value) === value;
    mark();
  }
  function mark() { for (const answer of answers) answer.classList.toggle("ranked", rankOf(answer) > 0); }
  if (kind === "rank") { form.addEventListener("change", mark); mark(); }

  // Keys, which a person can switch off: a screen reader or dictation may use letters.
  const keys = document.getElementById("keys");
  keys.closest("label").hidden = false;
  keys.checked = remembered.get("label keys") !== "off";
  keys.addEventListener("change", () => remembered.set("label keys", keys.checked ? "on" : "off"));
  const hint = document.getElementById("hint");
  if (hint) hint.hidden = false;
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      const send = form.querySelector("[data-key=Enter]");
      if (send) { event.preventDefault(); form.requestSubmit(send); }
      return;
    }
    if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("textarea, input[type=text]")) return;
    const letter = event.key.toLowerCase();
    if (kind === "rank") {
      if (event.key === "Backspace" && order.length) { event.preventDefault(); setRank(order.pop(), 0); return; }
      if (answers.some((each) => each.dataset.letter.toLowerCase() === letter)) {
        event.preventDefault();
        rank(letter, event.shiftKey);
        return;
      }
    }
    const button = form.querySelector(`button[data-key="${CSS.escape(letter)}"]`);
    if (button && !button.disabled) { event.preventDefault(); form.requestSubmit(button); }
  });
})();
