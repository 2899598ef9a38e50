/* Keyboard, language and scrolling: the few things that have to happen in the browser. */
(() => {
  const COOKIE = "kotae_language";
  const header = () => document.querySelector(".k-header");
  const here = () => (/\/ja\/?$/.test(location.pathname) ? "ja" : "en");
  const chosen = () => (document.cookie.match(/(?:^|; )kotae_language=(en|ja)/) || [])[1];
  const remember = language => {
    document.cookie = `${COOKIE}=${language}; path=/; max-age=31536000; samesite=lax`;
  };
  const pathIn = language => {
    const app = location.pathname.replace(/\/ja\/?$/, "/").replace(/\/?$/, "/");
    return language === "ja" ? `${app}ja` : app;
  };
  const go = language => {
    remember(language);
    if (language !== here()) location.replace(pathIn(language) + location.hash);
  };

  // The first visit follows the browser, a later one what the person chose.
  const first = chosen() || ((navigator.language || "en").toLowerCase().startsWith("ja") ? "ja" : "en");
  if (first !== here()) location.replace(pathIn(first) + location.hash);
  document.documentElement.lang = here();

  window.kotae = {
    go,
    prefer() {
      const preferred = header()?.dataset.preferred;
      if (preferred && !chosen()) go(preferred);
    },
  };

  const side = change => document.getElementById("chat-page")?.classList[change]("k-side-open");
  const isShown = element => element && element.offsetParent !== null && !element.disabled;
  const press = selector => {
    const element = [...document.querySelectorAll(selector)].find(isShown);
    if (element) element.click();
    return Boolean(element);
  };
  const focus = selector => {
    const element = [...document.querySelectorAll(selector)].find(isShown);
    if (element) element.focus();
    return Boolean(element);
  };
  const KEYS = {
    u: () => press(".k-answer-bar [data-act=up]"),
    d: () => press(".k-answer-bar [data-act=down]"),
    e: () => press(".k-answer-bar [data-act=correct]"),
    r: () => press(".k-answer-bar [data-act=again]"),
    c: () => focus("#chat-question textarea, #compare-question textarea"),
    "/": () => focus("#chat-search input, #chat-search textarea"),
    a: () => press(".k-vote[data-key=a]"),
    b: () => press(".k-vote[data-key=b]"),
    t: () => press(".k-vote[data-key=t]"),
    x: () => press(".k-vote[data-key=x]"),
    n: () => press("#compare-votes [data-act=next]"),
    1: () => press("[data-act=strength][data-id='1']"),
    2: () => press("[data-act=strength][data-id='2']"),
    3: () => press("[data-act=strength][data-id='3']"),
  };
  const isTyping = target =>
    target.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName) && target.type !== "radio";

  document.addEventListener("keydown", event => {
    if (event.isComposing || event.keyCode === 229) {
      if (event.key === "Enter") event.stopPropagation(); // confirms Japanese input, does not send
      return;
    }
    if (event.key === "Escape" && !press("#chat-stop")) {
      side("remove");
      if (isTyping(event.target)) event.target.blur();
      return;
    }
    if (isTyping(event.target) || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const act = KEYS[event.key.toLowerCase()];
    if (act && act()) event.preventDefault();
  }, true);

  // Stay at the end of the conversation while it grows, unless the person has scrolled up.
  const NEAR_PX = 120;
  const follow = box => {
    let isAtEnd = true;
    box.addEventListener("scroll", () => {
      isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_PX;
    }, { passive: true });
    new MutationObserver(() => {
      if (isAtEnd) box.scrollTop = box.scrollHeight;
    }).observe(box, { childList: true, subtree: true, characterData: true });
  };
  const seen = new WeakSet();
  new MutationObserver(() => {
    const box = document.getElementById("chat-scroll");
    if (box && !seen.has(box)) {
      seen.add(box);
      follow(box);
    }
  }).observe(document.documentElement, { childList: true, subtree: true });

  // On a phone the list of conversations opens over the page, and closes once one was chosen.
  document.addEventListener("click", event => {
    const isToggle = event.target.closest("[data-toggle-side]");
    if (isToggle) side("toggle");
    else if (!event.target.closest("#chat-side")) side("remove");
    if (event.target.closest("#chat-list [data-act=open], #chat-new")) side("remove");
  });
})();
