"""What kernels cost, found out without the hardware."""

from pallas_kernels.analysis.interpreter import UnknownValueError
from pallas_kernels.analysis.performed import PerformedCopies, performed_copies
from pallas_kernels.analysis.traffic import KernelTraffic, OperandTraffic, Traffic, count_traffic

__all__ = [
    "KernelTraffic",
    "OperandTraffic",
    "PerformedCopies",
    "Traffic",
    "UnknownValueError",
    "count_traffic",
    "performed_copies",
]
