// The dialog that asks for an API key.

import { hasKey, onKeyNeeded, setKey } from "./api.js";
import { $ } from "./dom.js";

let asking = null;

/** Ask once, however many calls need the key. */
function ask(wrong) {
  asking ??= new Promise((answer) => {
    const dialog = $("key-dialog");
    $("key-why").textContent = wrong
      ? "The server does not take this key."
      : "This server asks for a key. It is sent to this server only.";
    $("key").value = "";
    $("key-forget").hidden = !hasKey();
    dialog.returnValue = "cancel";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const given = dialog.returnValue === "use" ? $("key").value.trim() : "";
        if (given) setKey(given, $("key-keep").checked);
        if (dialog.returnValue === "forget") setKey(null);
        answer(given || null);
      },
      { once: true },
    );
    dialog.showModal();
    $("key").focus();
  });
  return asking;
}

export function setUpKeys() {
  onKeyNeeded((wrong) => {
    $("key-open").hidden = false;
    return ask(wrong);
  });
  $("key-open").hidden = !hasKey();
  $("key-open").addEventListener("click", async () => {
    const before = hasKey();
    if ((await ask(false)) || before !== hasKey()) location.reload();
  });
}
