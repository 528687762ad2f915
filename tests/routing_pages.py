"""Checks of the page of `pemoe routes`."""

import html.parser


class Page(html.parser.HTMLParser):
    """A page's elements with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text += text


def check_self_contained(page: Page, pictures: int) -> None:
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(images) == pictures
    assert all(image.startswith("data:image/png;base64,iVBOR") for image in images)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert attributes.get("href", "#").startswith("#")
        assert tag == "img" or "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.text and "@import" not in page.text  # in the style sheet
