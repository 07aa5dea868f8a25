"""Hook of mkdocs: a link whose text is the file name of a page gets the title of that page."""

import re
from pathlib import Path
from typing import Any


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """Replace ``[page.md](page.md...)`` by ``[title](page.md...)``."""

    def titled(match: re.Match[str]) -> str:
        title = Path(config.docs_dir, match[1]).read_text().splitlines()[0].removeprefix("# ")
        return f"[{title}]({match[1]}"

    return re.sub(r"\[(\w+\.md)\]\(\1", titled, markdown)
