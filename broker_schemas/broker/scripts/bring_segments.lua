-- Brings training segments where commit_match takes them, at the server's own memory limit too: where nothing is
-- ready yet, only rollouts that become segments lead to memory that can be freed. Said again, the last stands.
-- ARGV[2]  seconds that a segment stays when nobody takes it
-- ARGV[3]  number of segments, then record id and body of each, from ARGV[4]
-- Reply: number of segments.
go_on_at_the_limit()
for i = 1, tonumber(ARGV[3]) do
  redis.call('SET', PREFIX .. 'made:' .. ARGV[2 + 2 * i], ARGV[3 + 2 * i], 'EX', ARGV[2])
end
return tonumber(ARGV[3])
