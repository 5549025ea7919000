"""What a model takes: an MLflow signature compiled to checked rows. Knows numpy and pandas, neither HTTP nor MLflow."""
