"""Rules that keep or drop a document.

To add a rule, add a file here with a frozen dataclass of thresholds that is called with a text, decorated with
`@rule("NAME", place=...)`, and set its thresholds in conf/pipeline/*.yaml as `rules: {NAME: {...}}`. No other place
names the rule.
"""

from data_pipeline.filters.base import REGISTER, Drop, Filter

REGISTER.import_folder(__name__, __path__)
RULES: dict[str, type[Filter]] = REGISTER.classes()  # in order of application

__all__ = ["REGISTER", "RULES", "Drop", "Filter"]
