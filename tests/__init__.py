"""One test file per room; `contract.py` is written once and run over every kind of store."""
