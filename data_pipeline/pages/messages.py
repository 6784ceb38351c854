"""Messages of the extraction process (worker.py), for both ends.

Request: HEADER (bytes of the label, bytes of the page, max_document_bytes), the label, the page. Answer: ANSWER (kind,
bytes), then the text, or `reason` and `detail` on two lines.
"""

import struct

HEADER, ANSWER = struct.Struct(">HQQ"), struct.Struct(">BQ")
TEXT, REFUSED = 0, 1  # kinds of answer
