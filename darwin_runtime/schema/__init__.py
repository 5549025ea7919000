"""The schema of a model: its MLflow signature, compiled to a parser of rows. It knows neither HTTP nor MLflow."""
