"""Rules that keep or drop a document.

To add a rule, add a file here with a frozen dataclass of thresholds that is called with a text, decorated with
`@rule("NAME", place=...)`, and give its thresholds in conf/pipeline/*.yaml as `rules: {NAME: {...}}`. Nothing else
names it.
"""

from data_pipeline.filters.base import REGISTER, Drop, Filter

REGISTER.import_folder(__name__, __path__)
RULES: dict[str, type[Filter]] = REGISTER.classes()  # in the order in which they are asked

__all__ = ["REGISTER", "RULES", "Drop", "Filter"]
