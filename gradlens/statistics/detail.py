"""Which steps get detail: exact histograms of all entries, which cost as much as all other columns together.

Each observed step at first, then one whenever their number has grown by a tenth: some 130
steps of a million. All stages and backwards of a step are alike.
"""

from __future__ import annotations

from gradlens.schedules import Growing


class DetailSteps:
    """Decides once for each observed step; asked again about a step, it gives the same answer."""

    def __init__(self) -> None:
        self._answers: dict[int, bool] = {}  # of the last steps: those of two may take turns
        self._growing = Growing()

    def of(self, step: int) -> bool:
        """Whether this step gets detail."""
        answer = self._answers.get(step)
        if answer is None:
            answer = self._answers[step] = self._growing.due()
            if len(self._answers) > 4:
                del self._answers[next(iter(self._answers))]
        return answer
