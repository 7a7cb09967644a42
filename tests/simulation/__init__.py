"""
A deterministic simulation: one seed drives clients and daemon over a network, a disk and a clock that misbehave.

What ships is what runs: the registry, the codec, sessions, the client's links and traffic, the actors, group
commit, identities and paging. Simulated are only the world around them (``network``, ``disk``, the clock), the
callers (``clients``, ``rogue``) and their wishes (``work``). ``checker`` holds every seed to the promises, and
``mutants`` proves that it can fail.

    python -m tests.simulation SEED              replay one seed
    python -m tests.simulation --seeds 20000     search
    python -m tests.simulation --mutants         break one line at a time, and find each
"""
