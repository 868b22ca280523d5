-- Takes or prolongs the lease of a request while a producer works on it.
-- KEYS[3]  requests  zset  as in issue_requests
-- ARGV[2]  request id
-- ARGV[3]  lease_ms
-- Reply: 1, or 0 when the request is closed: its records are no longer wanted.
if not redis.call('ZSCORE', KEYS[3], ARGV[2]) then return 0 end
redis.call('ZADD', KEYS[3], 'XX', now_ms() + tonumber(ARGV[3]), ARGV[2])
return 1
