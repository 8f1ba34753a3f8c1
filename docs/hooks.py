"""What mkdocs does to the pages beside rendering them."""


def on_page_content(html: str, **_: object) -> str:
    """Docstrings end a line before code with "::", as reStructuredText does: show one colon."""
    return html.replace("::</p>", ":</p>")
