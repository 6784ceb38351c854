"""Human audit of a filter: draw a sample of documents, judge it in a browser, compare people with the filter.

Public: `draw.draw` (scored shards and a filter -> samples), `samples` (the file of sampled documents), `answers` (the
file of verdicts), `agreement.summary` and `agreement.decisions` (comparison of filter and verdicts).
"""
