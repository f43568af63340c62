"""A report on what the kernels compute here, which a user can send with a bug.

cases.py         which problems: the shapes of `mla-triton check`, and what else a call may have
examine.py       a problem computed by every implementation, held against its budget, repeated
environment.py   versions, driver, cards, directories
histogram.py     how the errors of a case are spread, in units of their budget
text.py          the report as lines, and as JSON
page.py          the report as one page of HTML, with nothing to load
"""
