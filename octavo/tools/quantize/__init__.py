"""octavo quantize: an FP8 checkpoint to keep."""

import octavo.engine  # noqa: F401 (says how torch's threads wait, before torch is loaded)
