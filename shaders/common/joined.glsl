// 1: nobody keeps the lists of a plan, which follow each other in scratch.
layout(constant_id = 13) const uint JOINED = 0;
