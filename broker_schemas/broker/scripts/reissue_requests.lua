-- Finds requests whose lease has ended: opens them again, or gives them up after too many attempts.
-- KEYS[3]  requests  zset  as in issue_requests
-- ARGV[2]  lease_ms
-- ARGV[3]  attempts a request may have
-- ARGV[4]  how many to look at in one call
-- Reply: flat list of request id, attempt, spec of those to run again.
local now, again = now_ms(), {}
local ended = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', now, 'LIMIT', 0, tonumber(ARGV[4]))
for _, id in ipairs(ended) do
  local key = PREFIX .. 'request:' .. id
  local attempt = redis.call('HINCRBY', key, 'attempt', 1)
  if attempt > tonumber(ARGV[3]) then
    fail_request(id, 'abandoned', 'no producer finished it in ' .. ARGV[3] .. ' attempts')
  else
    redis.call('ZADD', KEYS[3], now + tonumber(ARGV[2]), id)
    emit('reissued', 'request_id', id, 'attempt', attempt)
    count('reissued', 1)
    again[#again + 1] = id
    again[#again + 1] = attempt
    again[#again + 1] = redis.call('HGET', key, 'spec')
  end
end
return again
