// Whether something holds for any thread of the workgroup, which all threads ask for together.
shared bool any_thread_found;

bool any_thread(bool own) {
  barrier();
  if (gl_LocalInvocationID.x == 0) any_thread_found = false;
  barrier();
  if (own) any_thread_found = true;
  barrier();
  return any_thread_found;
}
