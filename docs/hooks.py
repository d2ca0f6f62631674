"""What the site does to a page: links to files outside docs/, which work in the repository only, become plain text."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?!pictures|[\w-]+\.(?:md|ipynb))[^)]*\)", r"\1", markdown)
