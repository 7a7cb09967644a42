"""
Power cuts: what a disk may hold when the power fails, rebuilt from a journal of writes and syncs.

``cut.c`` is preloaded into the daemon and keeps the journal; ``library`` compiles it and gives it orders;
``journal`` reads it; ``disk`` says what a disk may hold at a cut, by two models; ``script`` is the load, a pure
function; ``load`` runs it in client processes; ``run`` makes a run, ``rig`` cuts it, and ``witness`` judges each disk.
"""
