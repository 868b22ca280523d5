-- Gives a request up with a reason; its records count as rejected.
-- KEYS[3]  requests  zset  as in issue_requests
-- ARGV[2]  request id
-- ARGV[3]  reason, a short word
-- ARGV[4]  detail, one line
-- Reply: number of records given up; 0 when the request was closed already.
go_on_at_the_limit()
return fail_request(ARGV[2], ARGV[3], ARGV[4])
