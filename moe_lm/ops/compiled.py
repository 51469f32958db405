"""How loops over rows are compiled (Numba), at their first call: tenths of a second a loop and type of number."""

from numba import njit

# Threads do not wait for each other; sums go in any order, so in vectors; NaN and infinity stay what they are.
compiled = njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})
