"""What happens to a run when it is killed, its disk fills, its files rot, or its data change: counted, case by case."""
