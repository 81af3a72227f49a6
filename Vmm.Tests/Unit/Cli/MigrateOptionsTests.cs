using System.Text.Json.Nodes;
using Vmm.Tools.Cli.Migrate;
using Vmm.Tools.Cli.Shell;

namespace Vmm.Tests.Unit.Cli;

internal sealed class MigrateOptionsTests
{
    private static readonly JsonObject s_known = (JsonObject)JsonNode.Parse(
        """{"max-bandwidth": 134217728, "mode": "normal", "direct-io": false, "tls-creds": "", "downtime-limit": 300, "cpr-exec-command": []}""")!;

    [TestCase("tcp:h:1", true)]
    [TestCase("unix:/a", true)]
    [TestCase("file:/a", false)]
    [TestCase("exec:cat", false)]
    [TestCase("fd:x", false)]
    public void The_return_path_is_on_where_the_transport_has_two_ways(string to, bool on) =>
        Assert.That(MigrateOptions.Parse(to, [], [], null).Capabilities, Is.EqualTo(new[] { KeyValuePair.Create("return-path", on) }));

    [Test]
    public void A_return_path_that_the_user_switched_off_stays_off() =>
        Assert.That(MigrateOptions.Parse("tcp:h:1", [], ["return-path=off", "events"], null).Capabilities,
            Is.EqualTo(new[] { KeyValuePair.Create("return-path", false), KeyValuePair.Create("events", true) }));

    [Test]
    public void Files_and_sockets_are_meant_relative_to_the_command() => Assert.Multiple(() =>
    {
        Assert.That(MigrateOptions.Parse("file:a.mig,offset=4K", [], [], null).Uri, Is.EqualTo($"file:{Path.GetFullPath("a.mig")},offset=0x1000"));
        Assert.That(MigrateOptions.Parse("unix:a.sock", [], [], null).Uri, Is.EqualTo($"unix:{Path.GetFullPath("a.sock")}"));
        Assert.That(MigrateOptions.Parse("tcp:[::1]:5,to=9", [], [], null).Uri, Is.EqualTo("tcp:[::1]:5,to=9"));
    });

    [Test]
    public void Parameters_take_the_type_that_the_VM_has_for_them() =>
        Assert.That(MigrateOptions.Parse("tcp:h:1", ["max-bandwidth=1G/s", "mode=cpr-reboot", "direct-io=on", "tls-creds=5", "downtime-limit=7", "cpr-exec-command=a b"], [], null)
            .ParameterArguments(s_known).ToJsonString(),
            Is.EqualTo("""{"max-bandwidth":1073741824,"mode":"cpr-reboot","direct-io":true,"tls-creds":"5","downtime-limit":7,"cpr-exec-command":["a","b"]}"""));

    [TestCase("nope", "tcp:h:1", "", "", "--set: expected key=value")]
    [TestCase("", "bogus", "", "", "--to 'bogus'")]
    [TestCase("", "tcp:h:0", "", "", "port 0")]
    [TestCase("", "tcp::1", "", "", "host is missing")]
    [TestCase("", "tcp:h:1", "events=2", "", "'events' expects on or off")]
    [TestCase("", "tcp:h:1", "events,events=off", "", "'events' is given twice")]
    [TestCase("", "tcp:h:1", "", "0", "--timeout")]
    public void Wrong_options_are_usage_and_named(string set, string to, string capability, string timeout, string expected) =>
        Assert.That(() => MigrateOptions.Parse(to, Split(set), Split(capability), timeout.Length > 0 ? double.Parse(timeout) : null), Usage(expected));

    [TestCase("nope=1", "parameter 'nope' is not known")]
    [TestCase("max-bandwidth=fast", "'max-bandwidth' expects a number, found 'fast'")]
    [TestCase("max-bandwidth=-1", "expects a number")]
    public void Wrong_parameters_are_usage_and_named(string set, string expected) =>
        Assert.That(() => MigrateOptions.Parse("tcp:h:1", [set], [], null).ParameterArguments(s_known), Usage(expected));

    [Test]
    public void A_capability_that_the_VM_does_not_know_is_usage_and_named() =>
        Assert.That(() => MigrateOptions.Parse("tcp:h:1", [], ["warp"], null).CapabilityArguments(new JsonArray(new JsonObject { ["capability"] = "return-path" })),
            Usage("'warp' is not known to this VM; known: return-path"));

    [Test]
    public void A_parameter_twice_is_refused() =>
        Assert.That(() => MigrateOptions.Parse("tcp:h:1", ["mode=a", "mode=b"], [], null).ParameterArguments(s_known), Usage("'mode' is given twice"));

    private static string[] Split(string text) => text.Split(',', StringSplitOptions.RemoveEmptyEntries);

    private static NUnit.Framework.Constraints.IResolveConstraint Usage(string text) => Throws.InstanceOf<Exception>().With.Message.Contains(text).And
        .Matches<Exception>(static e => e is CliException { Code: ExitCode.Usage } or Vmm.Core.Errors.ConfigurationException);
}
