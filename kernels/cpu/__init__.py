"""CPU kernels in Numba: functions on addresses and integers.

From the bottom up: `cache` (the folder of compiled code), `emit` (vector code through llvmlite), `kernel` (when kernels
are compiled), `words` (the layout of a plan), the ops, `plan` (runs descriptors), `pool` (threads). Importing this
package imports nothing; importing any of its modules but `words` and `loading` imports Numba.
"""
