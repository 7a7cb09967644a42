"""
Fuzzing: frames that nobody honest sends, at the wire code, at a live daemon, and at a client.

``frames`` makes them from one seed: valid messages of every kind, mutated along their grammar or byte by byte, with
a corpus that grows by every new sentence of refusal. ``targets`` takes them in process, as the actors and links
would, and ``search`` gives them there. ``assault`` sends them to a live daemon and knows of each that it was taken.
``witness`` is the honest client beside it all, ``impostor`` a daemon that answers a real client wrongly. What ever
failed is a line of ``corpus.txt``.
"""
