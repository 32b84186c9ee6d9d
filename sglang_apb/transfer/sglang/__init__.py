"""What SGLang calls (`disaggregation/base/conn.py`), on top of the endpoints."""
