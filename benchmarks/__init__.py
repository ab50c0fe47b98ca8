"""What the rotation costs, against its peers (`python -m benchmarks`), and the ledger of claims (`ledger.py`)."""
