"""What the tests of every op need to know about one, which is what ``vidkern verify`` needs to know.

A new op is tested by being registered: :func:`room` fails for an op without an entry in vidkern/verify/rooms.py, and the matrix
test fails for an op or a backend that expected_matrix.toml does not list.
"""

from vidkern.verify.rooms import ROOMS, Room, room

__all__ = ["ROOMS", "Room", "room"]
