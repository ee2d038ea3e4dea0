"""gradlens: which way should each weight move to lower the loss, and how sure is that?

Live names need torch and are loaded when first used; offline ones (`open_run`, rules, fields) do not.
"""

from __future__ import annotations
