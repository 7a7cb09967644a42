"""
Faults by name: each strikes a real daemon under load from clients, and a checker says what became of every call.

``scene`` is the stage, ``strikes`` the faults that strike while it runs, ``damage`` those that a start meets.
``python -m tests.faults`` prints the table.
"""
