"""
Torture: real clients and a real daemon, killed with -9 in the middle of their work, and a proof of what became of it.

``work`` is what a client process does, ``history`` what it notes of each call, ``checker`` holds all notes
and the final database to the promises, ``rig`` starts, kills, freezes and settles.
"""
