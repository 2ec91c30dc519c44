"""Stop strings over a stream of text: nothing of one is ever shown, and nothing else is lost."""

__all__ = ["StopFilter"]


class StopFilter:
    """Passes text on until one of the stop strings is complete, holding back what may yet become one.

    The text ends before the stop string that is complete first; of two complete at the same character, the longer.

    Args:
        stops: texts of at least one character.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._stops = stops
        self._longest = max(map(len, stops))
        self._held = ""

    def push(self, piece: str) -> str:
        """Add a piece of text; what can be shown now."""
        if self.stopped:
            return ""
        text = self._held + piece
        # (end, start) of each stop string's first occurrence: a stop string cannot begin in what was shown, because
        # whatever could begin one was held back
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                self._held = text[start:]
                return text[:start]
        self._held = ""
        return text

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held
