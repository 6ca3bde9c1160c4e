"""What judges share whose questions have one right answer out of a task's fixed list: classes, or items to rank."""
