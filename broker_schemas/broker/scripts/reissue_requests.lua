-- Finds requests whose time has come. One that a worker took and let go of without a word is opened again, or given
-- up after too many attempts; one that no worker has taken keeps its attempt: its job should still be in the queue.
-- KEYS[3]  requests  zset  as in issue_requests
-- ARGV[2]  lease_ms
-- ARGV[3]  attempts a request may have
-- ARGV[4]  how many to look at in one call
-- Reply: {number looked at, then flat: request id, attempt, spec, 1 where no worker had taken it else 0}
go_on_at_the_limit()
local now = now_ms()
local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, tonumber(ARGV[4]))
local found = {#due}
for _, id in ipairs(due) do
  local key = PREFIX .. 'request:' .. id
  local attempt, spec, taken = unpack(redis.call('HMGET', key, 'attempt', 'spec', 'taken'))
  if not spec then
    redis.call('ZREM', KEYS[3], id)
  elseif taken and tonumber(attempt) >= tonumber(ARGV[3]) then
    fail_request(id, 'abandoned', 'no producer finished it in ' .. ARGV[3] .. ' attempts')
  else
    if taken then
      attempt = redis.call('HINCRBY', key, 'attempt', 1)
      redis.call('HDEL', key, 'taken')
      emit('reissued', 'request_id', id, 'attempt', attempt)
      count('reissued', 1)
    end
    redis.call('ZADD', KEYS[3], now + look_after(ARGV[2]), id)
    for _, value in ipairs({id, tonumber(attempt), spec, taken and 0 or 1}) do found[#found + 1] = value end
  end
end
return found
