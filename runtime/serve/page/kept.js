/** What this browser keeps for the page. Where it is told to keep nothing, that lasts as long as the page. */

/** @param {"sessionStorage" | "localStorage"} name @returns {Pick<Storage, "getItem" | "setItem" | "removeItem">} */
function opened(name) {
  try {
    return window[name]; // throws where cookies and site data are blocked
  } catch {
    const kept = new Map();
    return {
      getItem: (key) => kept.get(key) ?? null,
      setItem: (key, value) => kept.set(key, value),
      removeItem: (key) => kept.delete(key),
    };
  }
}

/** As long as the tab. */
export const inTab = opened("sessionStorage");
/** For the next visit, too. */
export const inBrowser = opened("localStorage");
