"""Two rows of the fault campaign (`bench.faults`) that need a server and a browser.

A hub that breaks downloads off, and texts and names with a script in them on a page of the book.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pandas as pd

from instructmining_core.models import hub

from .faults import ROOT, Campaign, Row

NETWORK = """
import sys
from instructmining_core.config import ModelRef
from instructmining_core.models import hub
try:
    print(hub.model_sha256(hub.fetch(hub.resolve(ModelRef("made/up"))).folder))
except hub.HubError as error:
    sys.exit(f"error: {error}")
"""


def network(own: Campaign, tries: int) -> Iterator[Row]:
    """A server that breaks a download off after some bytes, then one that does not."""
    row = Row("network gone in a download", "a model from the hub", "a local hub breaks off")
    base = own.world.folder / "base"
    commit = "0123456789abcdef0123456789abcdef01234567"
    listed = [{"rfilename": path.name} for path in sorted(base.iterdir())]

    class Hub(BaseHTTPRequestHandler):
        left = 10**9  # bytes that it still sends

        def do_HEAD(self) -> None:
            self._answer(send=False)

        def do_GET(self) -> None:
            self._answer(send=True)

        def _answer(self, send: bool) -> None:
            name = self.path.split("?")[0].rpartition("/")[2]
            if "/tree/" in self.path:
                content = json.dumps([
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": commit}
                    for p in sorted(base.iterdir())]).encode()  # fmt: skip
            elif "/api/" in self.path:
                content = json.dumps({"id": "made/up", "sha": commit, "siblings": listed}).encode()
            elif (base / name).is_file():
                content = (base / name).read_bytes()
            else:
                return self.send_error(404)
            first = 0
            if given := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
                first = int(given[1])
            self.send_response(206 if first else 200)
            for key, value in (("Content-Length", len(content) - first), ("ETag", f"\"{name}\""),
                               ("X-Repo-Commit", commit), ("Accept-Ranges", "bytes"),
                               ("Content-Range", f"bytes {first}-{len(content) - 1}/"
                                                 f"{len(content)}")):
                self.send_header(key, str(value))
            self.end_headers()
            if send:
                part = content[first:][: max(0, Hub.left)]
                Hub.left -= len(part)
                self.wfile.write(part)
                self.close_connection = True

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    whole = sum(path.stat().st_size for path in base.iterdir())
    expected = hub.model_sha256(base)
    for k in range(tries):
        home = own.folder / f"hf{k}"
        env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
               "HF_HOME": str(home), "HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_XET": "1",
               "HF_HUB_DOWNLOAD_TIMEOUT": "2"}  # fmt: skip
        Hub.left, said = own.rng.randrange(whole), ""
        for _ in range(2):  # broken off, and then with the network back
            done = subprocess.run([sys.executable, "-c", NETWORK], cwd=ROOT, env=env, text=True,
                                  capture_output=True)  # fmt: skip
            said = done.stderr[-600:]
            if "Traceback" in done.stderr:
                row.wrong += 1
                row.notes.append(said)
            if done.returncode == 0:
                break
            row.refused += 1
            Hub.left = 10**9
        row.injected, row.compared = row.injected + 1, row.compared + 1
        good = done.stdout.strip() == expected
        row.same, row.wrong = row.same + good, row.wrong + (not good)
        if not good:
            row.notes.append(said)
    server.shutdown()
    yield row


PLANTED = ("<script>document.title='PLANTED'</script>"
           "<img src=x onerror=\"document.title='PLANTED'\">")  # fmt: skip


def script_tag(own: Campaign) -> Iterator[Row]:
    """Texts and names with a script in them: a page by the book's own builder, in a browser."""
    import nbformat as nb

    from instructmining.book import write_page
    from instructmining.reports import card_markdown
    from instructmining_core.regression.rule_card import load_rule

    row = Row("script tag in texts and names", "book", "the built page in headless Chromium; a "
              "page with the tag as raw HTML shows that it would be seen")  # fmt: skip
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    tool = Path(sys.executable).parent / "jupyter-book"
    if browser is None or not tool.exists():
        return
    table = pd.DataFrame({"id": [PLANTED], "messages": [[{"role": "user", "content": PLANTED}]]})
    card = json.loads((own.world.folder / "rule.json").read_text())
    planted = own.folder / "planted.json"
    planted.write_text(json.dumps(card | {"fitted_on": PLANTED, "not_for": PLANTED}))
    page = card_markdown(load_rule(str(planted)))
    outputs = {
        "texts": [nb.v4.new_output("display_data", {"text/html": table.to_html()}),
                  nb.v4.new_output("stream", name="stdout", text=PLANTED),
                  nb.v4.new_output("display_data", {"text/markdown": page})],
        "raw": [nb.v4.new_output("display_data", {"text/html": PLANTED})],
    }  # fmt: skip
    place = own.folder / "planted"
    (place / "book").mkdir(parents=True)
    (place / "_config.yml").write_text("title: x\nexecute: {execute_notebooks: 'off'}\n"
                                       "sphinx: {config: {nb_render_markdown_format: myst}}\n")
    (place / "book" / "_toc.yml").write_text("format: jb-book\nroot: texts\nchapters: "
                                              "[{file: raw}]\n")  # fmt: skip
    for name, found in outputs.items():
        cells = [nb.v4.new_markdown_cell("# A page"), nb.v4.new_code_cell("0", outputs=found)]
        nb.write(nb.v4.new_notebook(cells=cells), own.folder / "executed.ipynb")
        write_page(own.folder / "executed.ipynb", place / "book" / f"{name}.ipynb")
    subprocess.run([tool, "build", "book"], cwd=place, capture_output=True, check=True)
    seen = {}
    for name in outputs:
        html = place / "_build" / "html" / f"{name}.html"
        done = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
             "--virtual-time-budget=4000", f"--user-data-dir={place / 'profile'}", html.as_uri()],
            capture_output=True, text=True, timeout=120)  # fmt: skip
        seen[name] = "<title>PLANTED</title>" in done.stdout
    row.injected, row.compared = 1, len(outputs["texts"])
    row.wrong = int(seen["texts"]) + int(not seen["raw"])
    row.same = int(not row.wrong)
    yield row
